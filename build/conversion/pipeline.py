"""Reads ahead of the computation and writes after it, each in a thread, in bounded memory.

What is computed never depends on the threads: names are read in the order they were announced and
blocks written in the order they were given.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from build.conversion.page_cache import BroughtPages, Range, give_back
from build.output.safetensors_writer import SafetensorsWriter
from build.sources.source import WeightSource

_OTHER_THREADS = 3  # read ahead, hash, write behind


@dataclass(frozen=True, slots=True)
class Buffers:
    """What may wait between the threads; with 0 one tensor is read ahead, one block written."""

    read_ahead_bytes: int = 512 << 20  # tensors that wait for the computation
    write_behind_bytes: int = 256 << 20  # blocks that wait for the disk


DEFAULT_BUFFERS = Buffers()


@contextmanager
def few_threads() -> Iterator[None]:
    """torch leaves the threads of this module a core each.

    Its own threads spin where they wait for each other. On two cores, beside the others, that took
    a third of a conversion's processor time and gained nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - _OTHER_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ReadAhead:
    """Reads `names` from a source, in this order, before they are asked for.

    Holds `max_bytes` or one tensor, and one more being read; a memory-mapped tensor's pages are
    brought into the page cache, and given back (page_cache.py). What the source raises comes out of
    `read`.
    """

    def __init__(self, source: WeightSource, names: Sequence[str], max_bytes: int) -> None:
        self._source = source
        self._names = names
        self._max_bytes = max_bytes
        self._ready: deque[tuple[str, torch.Tensor]] = deque()
        self._ready_bytes = 0
        self._brought: deque[list[Range]] = deque()  # by each tensor, in their order
        self._num_read = self._num_of_last = 0  # tensors of this unit, and of the one before
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def read(self, name: str) -> torch.Tensor:
        """The next announced tensor, which must be `name`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error)
            if not self._ready:
                assert self._error is not None
                raise self._error
            announced, tensor = self._ready.popleft()
            self._ready_bytes -= tensor.nbytes
            self._changed.notify_all()
        assert announced == name, f"{name} is asked for, {announced} was announced"
        self._num_read += 1
        return tensor

    def end_unit(self) -> None:
        """Gives the page cache's memory back of what was read before the calls since the last one:
        of those tensors nothing waits to be written any more."""
        for _ in range(self._num_of_last):
            give_back(self._brought.popleft())
        self._num_read, self._num_of_last = 0, self._num_read

    def _run(self) -> None:
        pages = BroughtPages()
        try:
            for name in self._names:
                tensor = self._source.read(name)
                self._brought.append(pages.bring_in(tensor))
                with self._changed:
                    self._changed.wait_for(partial(self._has_room, tensor.nbytes))
                    if self._closed:
                        return
                    self._ready.append((name, tensor))
                    self._ready_bytes += tensor.nbytes
                    self._changed.notify_all()
                del tensor
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        fits = self._ready_bytes + num_bytes <= self._max_bytes
        return self._closed or fits or not self._ready

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()
        while self._brought:
            give_back(self._brought.popleft())


class WriteBehind:
    """Appends blocks to files in the background; `max_bytes` or one block wait at a time.

    What fails there is raised by the next call here.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[Callable[[], object], int]] = deque()
        self._waiting_bytes = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="write behind", daemon=True)
        self._committer = ThreadPoolExecutor(1, "commit")
        self._commit: Future[None] | None = None

    def append(self, writer: SafetensorsWriter, name: str, block: torch.Tensor) -> None:
        """The next rows of a tensor; `block` may not change afterwards."""
        self._put(lambda: writer.append(name, block), block.nbytes)

    def commit(self, action: Callable[[], None]) -> None:
        """Runs `action` once everything given before is written, beside the next writes."""
        self._put(lambda: self._start_commit(action), 0)

    def _start_commit(self, action: Callable[[], None]) -> None:
        if self._commit is not None:
            self._commit.result()
        self._commit = self._committer.submit(action)

    def _put(self, action: Callable[[], object], num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(num_bytes) or self._error)
            if self._error is not None:
                raise self._error
            self._waiting.append((action, num_bytes))
            self._waiting_bytes += num_bytes
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        return self._waiting_bytes + num_bytes <= self._max_bytes or not self._waiting

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._closed)
                    if not self._waiting:
                        break
                    action, num_bytes = self._waiting.popleft()
                action()
                del action
                with self._changed:
                    self._waiting_bytes -= num_bytes
                    self._changed.notify_all()
            if self._commit is not None:
                self._commit.result()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._waiting.clear()
                self._changed.notify_all()

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            if kind is not None:
                self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
        self._committer.shutdown()
        if kind is None and self._error is not None:
            raise self._error
