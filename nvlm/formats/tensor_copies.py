"""Copies tensors of a file to a GPU: threads read pieces into pinned memory, from which the GPU
copies while they read the next.

One core brings 5 to 8 GB/s from the page cache; what stands between host and GPU takes 50. Pinned
memory: two pieces a thread, so 128 MiB at most, which torch keeps for later copies.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from queue import Empty, Queue
from types import TracebackType
from typing import Protocol

import torch

from nvlm.formats.safetensors_reader import SafetensorsReader, TensorSource
from nvlm.program.errors import UserError
from nvlm.program.own_stream import own_stream

PIECE_BYTES = 8 << 20
MAX_THREADS = 8
_BUFFERS_PER_THREAD = 2


class TensorCopies(Protocol):
    """Tensors of a source on a device, as they are stored. A context: what was asked for inside is
    there at its end, or after `wait`."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own."""
        ...

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """target: contiguous, on the device, of the tensor's type and shape."""
        ...

    def wait(self) -> None:
        """Until everything that was asked for is there. Raises what kept a piece from it."""
        ...

    def __enter__(self) -> TensorCopies: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def copies_of(source: TensorSource, device: torch.device) -> TensorCopies:
    """By threads from a file to a GPU that is in use. On a CPU a file's tensors stay mapped."""
    is_gpu = device.type == "cuda" and torch.cuda.is_initialized()  # no stand-in for one
    if is_gpu and isinstance(source, SafetensorsReader):
        return FileCopies(source, device)
    return DirectCopies(source, device)


class DirectCopies:
    """One tensor after the other."""

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self._source, self._device = source, device

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name).to(self._device)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        target.copy_(self._source.read(name))

    def wait(self) -> None:
        """Nothing is in flight."""

    def __enter__(self) -> DirectCopies:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a tensor."""

    offset: int  # in the file
    target: torch.Tensor  # [number of bytes] uint8 on the device
    is_free: torch.cuda.Event | None  # after what used the target's memory before


class FileCopies:
    """Pieces of at most `piece_bytes` by `num_threads`. Also to a CPU, for tests. Raises
    `UserError` for a file that was cut short since it was opened."""

    def __init__(
        self,
        reader: SafetensorsReader,
        device: torch.device,
        *,
        num_threads: int | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._reader, self._device = reader, device
        self._begins = reader.begins()
        self._num_threads = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._piece_bytes = piece_bytes
        self._pieces: Queue[_Piece | None] = Queue()
        self._threads: list[threading.Thread] = []
        self._errors: list[Exception] = []  # of any thread: then the rest is left
        self._is_over = False
        self._fd: int | None = None  # inside

    def read(self, name: str) -> torch.Tensor:
        info = self._reader.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype, device=self._device)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: torch.Tensor) -> None:
        info, offset = self._reader.tensors[name], self._begins[name]
        assert target.dtype == info.dtype, f"{name} is not copied as it is stored"
        assert tuple(target.shape) == info.shape, f"{name} has another shape"
        is_free = None
        if target.is_cuda:
            is_free = torch.cuda.Event()
            is_free.record(torch.cuda.current_stream(target.device))
        for part in target.view(-1).view(torch.uint8).split(self._piece_bytes):
            self._pieces.put(_Piece(offset, part, is_free))
            offset += len(part)
            if len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._work, name="nvlm-copies")
                thread.start()  # before it is listed: one that cannot start is not waited for
                self._threads.append(thread)

    def wait(self) -> None:
        self._pieces.join()
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> FileCopies:
        self._fd = os.open(self._reader.path, os.O_RDONLY)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._is_over = True
            self._pieces.put(None)
            for thread in self._threads:
                thread.join()
            assert self._fd is not None, "it was entered"
            os.close(self._fd)

    @torch.inference_mode()  # a thread's own, and tensors made in it take no writes outside
    def _work(self) -> None:
        """One thread: reads into one buffer while the GPU copies from the other."""
        buffers = deque[_Buffer]()
        busy = deque[_Buffer]()
        stream: torch.cuda.Stream | None = None
        while True:
            try:
                piece = self._pieces.get(block=not busy)
            except Empty:
                self._finish(busy.popleft(), buffers)
                continue
            if piece is None:
                self._pieces.put(None)  # for the other threads, also one that is not listed
                break
            try:
                if len(busy) == _BUFFERS_PER_THREAD:
                    self._finish(busy.popleft(), buffers)
                if self._is_over or self._errors:
                    self._pieces.task_done()
                    continue
                if stream is None and piece.target.is_cuda:
                    stream = own_stream(piece.target.device)
                buffer = buffers.popleft() if buffers else _Buffer(self._piece_bytes, stream)
                self._fill(buffer, piece)
                buffer.copy_to(piece)
                busy.append(buffer)
            except Exception as error:
                self._errors.append(error)
                self._pieces.task_done()
        for buffer in busy:
            self._finish(buffer, buffers)

    def _finish(self, buffer: _Buffer, free: deque[_Buffer]) -> None:
        try:
            buffer.wait()
        except Exception as error:
            self._errors.append(error)
        free.append(buffer)
        self._pieces.task_done()

    def _fill(self, buffer: _Buffer, piece: _Piece) -> None:
        assert self._fd is not None, "copies are asked for inside"
        place, offset = buffer.place[: len(piece.target)], piece.offset
        while place:
            count = os.preadv(self._fd, [place], offset)
            if count == 0:
                raise UserError(
                    f"{self._reader.path} is not a whole safetensors file (it ends at {offset}); "
                    "download or copy it again"
                )
            place, offset = place[count:], offset + count


class _Buffer:
    """Host memory of one piece, pinned for a stream; None on a CPU."""

    def __init__(self, num_bytes: int, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=stream is not None)
        # A thread that waits for the GPU leaves its core to those that read.
        self._is_copied = torch.cuda.Event(blocking=True) if stream is not None else None
        self.place: memoryview = self._bytes.numpy().data

    def copy_to(self, piece: _Piece) -> None:
        source = self._bytes[: len(piece.target)]
        if self._stream is None or self._is_copied is None:
            piece.target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            if piece.is_free is not None:
                self._stream.wait_event(piece.is_free)
            piece.target.copy_(source, non_blocking=True)
            self._is_copied.record(self._stream)

    def wait(self) -> None:
        if self._is_copied is not None:
            self._is_copied.synchronize()
