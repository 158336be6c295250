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
    """One layer, or what stands before or after the layers."""

    name: str  # in the journal
    reads: tuple[str, ...]  # published names, in the order `run` reads them
    writes: tuple[tuple[str, str], ...]  # (file, tensor) pairs
    run: Callable[[Read, OutputFiles], dict[str, Any]]  # does it; returns what the journal keeps
    states: RowFile | None = None  # what the next unit finds on disk; None: no samples run
