"""A unit of work: what the conversion does between two lines of its journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from build.conversion.calibration.row_file import RowFile
from build.conversion.output_files import OutputFiles
from build.sources.source import Read


@dataclass(frozen=True, slots=True)
class Unit:
    """One layer, or what stands before or after the layers.

    reads: published names, in the order `run` reads them. writes: (file, tensor) pairs. states:
    what the next unit finds on disk, if samples run. `run` returns what the journal keeps.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[tuple[str, str], ...]
    run: Callable[[Read, OutputFiles], dict[str, Any]]
    states: RowFile | None = None
