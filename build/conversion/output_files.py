"""The weight files of a checkpoint directory, all open at once and written in a thread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from build.conversion.journal import Journal
from build.conversion.pipeline import WriteBehind
from build.output.direct_file import page_buffer
from build.output.safetensors_writer import SafetensorsWriter
from nvlm.formats.manifest import FileEntry
from nvlm.formats.safetensors_reader import TensorInfo


class OutputFiles:
    """Files by their name below `directory`, for a `with` block.

    `finished` are the (file, tensor) pairs that an earlier run wrote; None makes new files. After
    the block `entries` says what the manifest says of each file.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Mapping[str, TensorInfo]],
        finished: Collection[tuple[str, str]] | None,
        write_behind_bytes: int,
    ) -> None:
        self.entries: dict[str, FileEntry] = {}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._behind = WriteBehind(write_behind_bytes)
        buffer = page_buffer()
        with ExitStack() as stack:  # closes what is open if one cannot be opened
            for file, infos in tensors.items():
                names = None if finished is None else {n for f, n in finished if f == file}
                writer = SafetensorsWriter(directory / file, infos, names, buffer)
                self._writers[file] = stack.enter_context(writer)
            self._opened = stack.pop_all()

    def append(self, file: str, name: str, block: torch.Tensor) -> None:
        """The next rows of a tensor; `block` may not change afterwards. One on a GPU waits there,
        and is copied back in the writing thread."""
        self._behind.append(self._writers[file], name, block)

    def commit(self, journal: Journal, record: dict[str, Any], done: Path | None) -> None:
        """Journals a unit when what it appended is on the disk; then `done` is needed no more."""

        def commit() -> None:
            for writer in self._writers.values():
                writer.sync()
            journal.commit(record)
            if done is not None:
                done.unlink(missing_ok=True)

        self._behind.commit(commit)

    def __enter__(self) -> OutputFiles:
        self._behind.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._behind.__exit__(kind, error, traceback)
            if kind is None:
                self.entries = {
                    file: FileEntry(writer.size_bytes, writer.sha256())
                    for file, writer in self._writers.items()
                }
        except BaseException as failure:
            self._opened.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._opened.__exit__(kind, error, traceback)
