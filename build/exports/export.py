"""A finished checkpoint directory -> a folder that other engines load, on one page.

Nothing is calibrated or quantised again, but the ViT where the format holds it in FP8. Units, the
journal and the buffers are those of a conversion; peak memory: a few blocks, and a tensor that
several ranks hold parts of.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from build.conversion.journal import Journal
from build.conversion.output_files import OutputFiles
from build.conversion.output_folder import LayerParts, OutputFolder, Rows
from build.conversion.pipeline import DEFAULT_BUFFERS, Buffers
from build.conversion.quantization.cast import row_blocks
from build.conversion.run_units import run_units
from build.conversion.unit import Unit
from build.exports.checkpoint_source import CheckpointSource
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.output.output_dir import OutputPlace, staged_directory
from build.sources.source import Read
from nvlm.formats.code_digest import code_digest
from nvlm.formats.manifest import is_current, write_manifest
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    DECODER_PREFIX,
    ENGINE_FIRST_TENSORS,
    ENGINE_LAST_TENSORS,
    ENGINE_LAYER_TENSORS,
    LM_HEAD,
    EngineTensor,
    model_tensors,
)
from nvlm.model.number_formats import LinearScales


def export(
    source: CheckpointSource,
    output_dir: Path,
    output_format: HuggingFaceFormat,
    *,
    overwrite: bool = False,
    buffers: Buffers = DEFAULT_BUFFERS,
) -> None:
    """`output_dir` appears whole or not at all, and the next run resumes an interrupted one."""
    made_from = _made_from(source, output_format)
    versions = {"code": code_digest(), "torch": torch.__version__}
    journal_of = partial(Journal.open, made_from={**made_from, "versions": versions})
    vision_scales = source.vision_scales(output_format.vision_format)
    place = OutputPlace(output_dir, "--output_dir", output_format.kind, overwrite)
    needed_bytes = output_format.needed_bytes(source.config, source.whole)

    def is_worth_keeping(staging: Path) -> bool:
        is_whole = is_current(staging, output_format.kind, **made_from)
        return is_whole or journal_of(staging).num_done > 0

    with staged_directory(place, needed_bytes, is_worth_keeping) as staging:
        if is_current(staging, output_format.kind, **made_from):
            return  # killed before it got its name
        folder = output_format.folder(source, source.config.vision, source.whole)
        units = _units(source, folder, vision_scales)
        entries = run_units(source, units, folder.files(), journal_of(staging), staging, buffers)
        for path in source.report_files:
            shutil.copyfile(path, staging / path.name)
        folder.finish(staging, None)
        write_manifest(staging, output_format.kind, limits={}, known=entries, **made_from)


def is_up_to_date(
    source: CheckpointSource, output_dir: Path, output_format: HuggingFaceFormat
) -> bool:
    """Whether `export` would only repeat what `output_dir` already holds."""
    return is_current(output_dir, output_format.kind, **_made_from(source, output_format))


def _made_from(
    source: CheckpointSource, output_format: HuggingFaceFormat
) -> dict[str, dict[str, Any]]:
    return {"arguments": output_format.arguments(source), "source": source.provenance()}


def _units(
    source: CheckpointSource, folder: OutputFolder, vision_scales: dict[str, LinearScales]
) -> list[Unit]:
    units = []
    if folder.has_vision:
        names = tuple(
            tensor.name
            for tensor in model_tensors(source.config)
            if not tensor.name.startswith(DECODER_PREFIX)
        )
        for group in _by_module(names):
            run = partial(_write_vision, folder, group, vision_scales)
            units.append(Unit(group[0], group, tuple(folder.vision_writes(group)), run))

    def top(name: str, tensors: tuple[EngineTensor, ...]) -> Unit:
        reads = tuple(source for tensor in tensors for source in tensor.sources)
        run = partial(_write_top, source, folder, tensors)
        return Unit(name, reads, tuple(folder.writes(tensors, None)), run)

    units.append(top("embedding", ENGINE_FIRST_TENSORS))
    for i in range(source.config.decoder.num_hidden_layers):
        prefix = DECODER_LAYER.format(i=i)
        reads = tuple(prefix + name for tensor in ENGINE_LAYER_TENSORS for name in tensor.sources)
        run = partial(_write_layer, source, folder, i)
        writes = tuple(folder.writes(ENGINE_LAYER_TENSORS, i))
        units.append(Unit(f"decoder layer {i}", reads, writes, run))
    units.append(top("head", ENGINE_LAST_TENSORS))
    return units


def _by_module(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Names of one layer stand together, and those of the embeddings and of the projector."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[: 4 if "layers" in parts else 1]), []).append(name)
    return [tuple(group) for group in groups.values()]


def _write_vision(
    folder: OutputFolder,
    names: tuple[str, ...],
    scales: dict[str, LinearScales],
    read: Read,
    out: OutputFiles,
) -> dict[str, Any]:
    for name in names:
        folder.write_vision(out, name, read(name), scales.get(name.removesuffix(".weight")))
    return {}


def _write_top(
    source: CheckpointSource,
    folder: OutputFolder,
    tensors: tuple[EngineTensor, ...],
    read: Read,
    out: OutputFiles,
) -> dict[str, Any]:
    for tensor in tensors:
        (name,) = tensor.sources
        scales = source.head_scales() if name == LM_HEAD else None
        folder.write_top(out, tensor, _rows(read(name)), scales)
    return {}


def _write_layer(
    source: CheckpointSource, folder: OutputFolder, i: int, read: Read, out: OutputFiles
) -> dict[str, Any]:
    prefix = DECODER_LAYER.format(i=i)

    def rows(tensor: EngineTensor, name: str) -> Rows:
        return _rows(read(prefix + name))

    parts = LayerParts(i, rows, source.scales(i), source.attention(i))
    folder.write_layer(out, parts)
    return {}


def _rows(stored: torch.Tensor) -> Rows:
    return Rows(iter(row_blocks(stored)), len(stored))
