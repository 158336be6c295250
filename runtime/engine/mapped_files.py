"""Whether the weights that a run has mapped are still those of its engine.

On a CPU weights stay mapped, and an engine's are hard links to its checkpoint's: whoever writes
into either file changes what a run computes with, without a word. So the size, time and inode of
the files are looked at before an answer is given out; a change is confirmed by hash.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from nvlm.formats import layout
from nvlm.formats.manifest import sha256_of
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir

log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int, int] | None
"""Size, time of the last change, inode and device; None where there is no file."""


class EngineChangedError(UserError):
    """The engine is no longer the one that was opened; no answer of it is believed."""


class MappedFiles:
    """Files of `engine` by their names in its manifest. One thread at a time looks.

    Files that are newer than the manifest were written to after it: they are hashed at once.
    """

    def __init__(self, engine: EngineDir, names: Iterable[str]) -> None:
        self._engine = engine
        self._stamps = {name: self._stamp(name) for name in names}
        if not self._stamps:
            return
        made = (engine.directory / layout.MANIFEST).stat().st_mtime_ns
        for name, stamp in self._stamps.items():
            if stamp is None or stamp[1] > made:
                log.info("%s is newer than its manifest and is hashed", engine.directory / name)
                self._confirm(name)

    @classmethod
    def of(cls, engine: EngineDir, device: torch.device) -> MappedFiles:
        """The weights of decoder and vision on a CPU; none on a GPU, which has copies."""
        folders = (f"{layout.LLM}/", f"{layout.VISION}/")
        names = [
            name
            for name in engine.manifest.files
            if name.startswith(folders) and not name.endswith(".json")
        ]
        return cls(engine, names if device.type == "cpu" else ())

    def require_unchanged(self) -> None:
        """Raises `EngineChangedError` for a file that is not what the manifest says, if it was
        touched since the last look. Costs a system call a file otherwise."""
        for name, before in self._stamps.items():
            now = self._stamp(name)
            if now != before:
                self._confirm(name)
                self._stamps[name] = now

    def _stamp(self, name: str) -> _Stamp:
        try:
            found = os.stat(self._engine.directory / name)
        except FileNotFoundError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev

    def _confirm(self, name: str) -> None:
        path = self._engine.directory / name
        if not self._is_as_made(path, name):
            raise EngineChangedError(
                f"{path} was changed or replaced while this program had it mapped (its SHA-256 is "
                "not the manifest's), so answers since then are refused; make it again with "
                f"build_engine.py --engine_dir {self._engine.directory} --overwrite, after its "
                "checkpoint, of which it is a hard link, where that was written to"
            )

    def _is_as_made(self, path: Path, name: str) -> bool:
        entry = self._engine.manifest.files[name]
        try:
            return path.stat().st_size == entry.size_bytes and sha256_of(path) == entry.sha256
        except OSError:
            return False
