"""Runs the units that the journal does not know: reading ahead, computing, writing after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from build.conversion.calibration.row_file import RowFile
from build.conversion.journal import Journal
from build.conversion.output_files import OutputFiles
from build.conversion.pipeline import Buffers, ReadAhead, few_threads
from build.conversion.unit import Unit
from build.sources.source import WeightSource
from nvlm.formats import layout
from nvlm.formats.manifest import FileEntry
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.formats.tensor_names import model_tensors

log = logging.getLogger(__name__)


def run_units(
    source: WeightSource,
    units: Sequence[Unit],
    files: Mapping[str, Mapping[str, TensorInfo]],
    journal: Journal,
    staging: Path,
    buffers: Buffers,
) -> dict[str, FileEntry]:
    """Makes `files` (tensors by file name); returns what the manifest says of them."""
    done, todo = units[: journal.num_done], units[journal.num_done :]
    if done:
        log.info("resuming after %s, %d of %d steps", done[-1].name, len(done), len(units))
    states = done[-1].states if done else None
    _keep_only(staging, {staging / name for name in files}, states)
    for name in files:
        (staging / name).parent.mkdir(exist_ok=True)
    finished = {pair for unit in done for pair in unit.writes} if done else None
    sizes = {t.name: TensorInfo(t.dtype, t.shape).num_bytes for t in model_tensors(source.config)}
    reads = [name for unit in todo for name in unit.reads]
    total = sum(sizes[name] for unit in units for name in unit.reads)
    # Samples want every core; without them the disk is what is waited for.
    runs_samples = any(unit.states is not None for unit in units)
    with (
        nullcontext() if runs_samples else few_threads(),
        OutputFiles(staging, files, finished, buffers.write_behind_bytes) as out,
        ReadAhead(source, reads, buffers.read_ahead_bytes) as reader,
        tqdm(total=total, unit="B", unit_scale=True) as progress,
    ):
        progress.update(sum(sizes[name] for unit in done for name in unit.reads))

        def read(name: str) -> torch.Tensor:
            tensor = reader.read(name)
            progress.update(sizes[name])
            return tensor

        for unit in todo:
            progress.set_description(unit.name)
            record = unit.run(read, out)
            out.commit(journal, record, None if states is None else states.path)
            reader.end_unit()
            states = unit.states
    return out.entries


def _keep_only(staging: Path, weights: set[Path], states: RowFile | None) -> None:
    """Deletes what an interrupted run wrote beside the weights, which is written again."""
    for path in staging.rglob("*"):
        is_states = path.name.startswith(layout.STATES_PREFIX)
        is_stale_states = is_states and (states is None or path != states.path)
        is_small_file = not path.name.startswith(".") and path not in weights
        if path.is_file() and (is_stale_states or is_small_file):
            path.unlink()
