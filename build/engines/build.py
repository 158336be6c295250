"""Step 2 on one page: checkpoint directory -> engine directory."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from build.engines import timing_cache
from build.engines.decoder_tensorrt_llm import DecoderBuildOptions, build_decoder
from build.engines.specification import BuildOptions, EngineSpec
from build.engines.vision_tensorrt import TensorrtOptions, TileProfile, build_vision
from build.output.output_dir import OutputPlace, staged_directory
from nvlm import __version__
from nvlm.formats import layout, manifest
from nvlm.formats.checkpoint_tensors import decoder_tensors, open_checked
from nvlm.formats.scale_dtype import SCALE_DTYPE, scale_dtype
from nvlm.planning.tensorrt_package import load_tensorrt
from nvlm.program.json_files import write_json_atomically

# Another disk, a file system without links, too many of them, or not ours to link.
_NO_LINK = (errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class BuildRun:
    """How to build, which changes nothing about what is built."""

    overwrite: bool = False  # replace a finished engine
    workers: int = 1  # ranks compiled at a time
    timing_cache: Path | None = None  # directory of TensorRT's measurements; None: nothing is kept


def build_engine(
    spec: EngineSpec, engine_dir: Path, options: BuildOptions, run: BuildRun | None = None
) -> None:
    """Writes vision, decoder, tokenizer and manifest; `engine_dir` appears whole or not at all."""
    run = run or BuildRun()
    for cache in (_vision_cache(spec, run), _decoder_cache(spec, run)):
        if cache is not None:
            timing_cache.check_writable(cache)
    place = OutputPlace(engine_dir, "--engine_dir", "engine", run.overwrite)
    with staged_directory(place, _needed_bytes(spec, place)) as staging:
        _build_vision(spec, options, run, staging / layout.VISION)
        _build_decoder(spec, options, run, staging / layout.LLM)
        _copy_tokenizer(spec.checkpoint_dir / layout.TOKENIZER, staging / layout.TOKENIZER)
        ranks = [layout.rank_file(rank) for rank in range(spec.config.world_size)]
        carried = {f"{layout.LLM}/{name}": name for name in ranks}
        vision = [f"{layout.VISION}/{name}" for name in (layout.WEIGHTS, layout.SCALES)]
        carried |= {name: name for name in vision}
        files = spec.checkpoint.files
        manifest.write_manifest(
            staging,
            "engine",
            arguments=asdict(options),
            limits=spec.limits.to_json(),
            source=_provenance(spec),
            known={name: files[old] for name, old in carried.items() if old in files},
        )


def is_up_to_date(spec: EngineSpec, engine_dir: Path, options: BuildOptions) -> bool:
    """Whether `build_engine` would only repeat what `engine_dir` already holds."""
    return manifest.is_current(
        engine_dir, "engine", arguments=asdict(options), source=_provenance(spec)
    )


def _provenance(spec: EngineSpec) -> dict[str, object]:
    """What the engine was made from, and what `auto` chose on this machine."""
    return {
        "checkpoint_digest": spec.checkpoint.digest,
        "checkpoint_versions": spec.checkpoint.versions,
        SCALE_DTYPE: scale_dtype(spec.checkpoint_dir, spec.config),
        "decoder": spec.decoder,
        "vision": spec.vision,
        "packages": spec.packages,
    }


def _needed_bytes(spec: EngineSpec, place: OutputPlace) -> int:
    """Disk for what is exported or compiled, and for what is carried over where links do not
    reach. A TensorRT engine stands beside its ONNX file while it is built."""
    times = {"onnxruntime": 1, "torch": 0, "tensorrt": 2, "tensorrt_rtx": 2}[spec.vision]
    made = times * spec.plan.vision_weight_bytes
    if spec.decoder == "tensorrt_llm":
        return made + spec.config.world_size * spec.plan.decoder_weight_bytes
    parent = next(p for p in (place.final, *place.final.parents) if os.path.exists(p))
    if parent.stat().st_dev == spec.checkpoint_dir.stat().st_dev:
        return made
    return made + sum(entry.size_bytes for entry in spec.checkpoint.files.values())


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)


def _build_vision(spec: EngineSpec, options: BuildOptions, run: BuildRun, directory: Path) -> None:
    directory.mkdir()
    source = spec.vision_checkpoint
    if spec.vision == "onnxruntime":
        from build.engines.vision_onnxruntime import export_vision  # needs onnx, onnxruntime

        export_vision(source, spec.vision_precision, directory)
    elif spec.vision == "torch":
        for name in (layout.WEIGHTS, layout.SCALES):
            if (source.directory / name).is_file():
                _link_or_copy(source.directory / name, directory / name)
    else:
        usual = min(
            spec.limits.max_num_images * source.tiling.max_tiles_per_image, spec.max_num_tiles
        )
        build_vision(
            load_tensorrt(spec.vision),
            source,
            spec.vision_precision,
            TensorrtOptions(
                TileProfile(1, usual, spec.max_num_tiles),
                compute_capability=options.compute_capability,
                timing_cache=_vision_cache(spec, run),
                keep_onnx=options.keep_onnx,
            ),
            directory,
        )
    write_json_atomically(
        directory / layout.CONFIG,
        {
            "executor": spec.vision,
            "precision": spec.vision_precision,
            "dtype": source.dtype,
            "vision": asdict(source.config),
            "tiling": asdict(source.tiling),
        },
    )


def _build_decoder(spec: EngineSpec, options: BuildOptions, run: BuildRun, directory: Path) -> None:
    """The torch target runs exactly the checkpoint's tensors; layouts are made at load."""
    directory.mkdir()
    for rank in range(spec.config.world_size):
        weights = spec.checkpoint_dir / layout.rank_file(rank)
        open_checked(weights, decoder_tensors(spec.config, rank))
        if spec.decoder == "torch":
            _link_or_copy(weights, directory / weights.name)
    if spec.decoder == "tensorrt_llm":
        decoder_options = DecoderBuildOptions(
            options.optimize_for, run.workers, _decoder_cache(spec, run)
        )
        build_decoder(spec.checkpoint_dir, spec.config, spec.limits, decoder_options, directory)
    write_json_atomically(
        directory / layout.decoder_config_file(spec.decoder),
        {
            "version": __version__,
            "pretrained_config": spec.config.to_json(),
            **spec.config.kv_cache.to_json(),
            "build_config": {"target": spec.decoder, **spec.limits.to_json()},
        },
    )


def _link_or_copy(source: Path, target: Path) -> None:
    """Carry a checkpoint's file over: by a hard link where the file system allows one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def _vision_cache(spec: EngineSpec, run: BuildRun) -> Path | None:
    if run.timing_cache is None or spec.vision != "tensorrt":
        return None
    return run.timing_cache / layout.VISION_TIMINGS


def _decoder_cache(spec: EngineSpec, run: BuildRun) -> Path | None:
    if run.timing_cache is None or spec.decoder != "tensorrt_llm":
        return None
    return run.timing_cache / layout.DECODER_TIMINGS
