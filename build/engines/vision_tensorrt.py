"""Vision targets `tensorrt` and `tensorrt_rtx`: ONNX -> strongly typed network -> engine.

The caller chooses the package that builds (nvlm/planning/tensorrt_package.py).
Precision: a dtype name, or "FP8": the four linears of each layer as Q/DQ with calibrated scales;
patch embedding, norms, attention products and projector stay in the checkpoint's dtype.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.engines.tensorrt_network import TensorrtBuildError, parse_onnx
from build.engines.tensorrt_summary import EngineSummary, summarise
from build.engines.vision_onnx import INPUT, export_graph, graph_module
from nvlm.formats import layout
from nvlm.formats.checkpoint_tensors import vision_linears
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.number_formats import FP8, format_named
from nvlm.planning.tensorrt_package import compute_capability, make_logger
from nvlm.program.json_files import write_json_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TileProfile:
    """How many tiles an engine takes at once."""

    smallest: int  # least number
    usual: int  # the number that it is tuned for
    largest: int  # most


@dataclass(frozen=True, slots=True)
class TensorrtOptions:
    """How to compile vision."""

    profile: TileProfile  # tiles a pass: least, best and most
    # "8.9" and the like, for `tensorrt_rtx` only; None: this machine's GPU.
    compute_capability: str | None = None
    timing_cache: Path | None = None  # file that is read, if there, and written
    keep_onnx: bool = False  # leave the exported ONNX beside the engine


def build_vision(
    trt: Any,
    checkpoint: VisionCheckpoint,
    precision: str,
    options: TensorrtOptions,
    directory: Path,
) -> EngineSummary:
    """Writes `model.engine` and `summary.json` (and keeps `model.onnx` if asked)."""
    model = graph_module(checkpoint, precision, checkpoint.dtype_around(precision))
    onnx = export_graph(model, checkpoint.config.image_size, directory)
    del model
    summary = build_engine_from_onnx(trt, onnx, options, directory)
    expected = 0
    if format_named(precision) is FP8:
        expected = len(vision_linears(checkpoint.config))
    if summary.num_fp8_products != expected:
        raise TensorrtBuildError(
            f"the network has {summary.num_fp8_products} FP8 products, expected {expected}"
        )
    if not options.keep_onnx:
        for path in (onnx, directory / layout.GRAPH_DATA):
            path.unlink(missing_ok=True)
    return summary


def build_engine_from_onnx(
    trt: Any, onnx: Path, options: TensorrtOptions, directory: Path
) -> EngineSummary:
    """Compiles a graph whose one input is `tiles` [num_tiles, 3, S, S]."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = parse_onnx(trt, builder, logger, onnx)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
    _set_compute_capability(trt, config, options.compute_capability)
    config.add_optimization_profile(_profile(builder, network, options.profile))
    cache = _load_timing_cache(config, options.timing_cache)
    log.info("building the vision engine with %s %s", trt.__name__, trt.__version__)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TensorrtBuildError(
            f"{trt.__name__} {trt.__version__} built no engine: {'; '.join(logger.errors)}"
        )
    with open(directory / layout.ENGINE, "wb") as file:
        file.write(plan)
    if options.timing_cache is not None and cache is not None:
        options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        options.timing_cache.write_bytes(cache.serialize())
    summary = summarise(trt, network, plan, logger)
    write_json_atomically(directory / layout.SUMMARY, summary.to_json())
    for line in summary.lines():
        log.info(line)
    return summary


def _profile(builder: Any, network: Any, tiles: TileProfile) -> Any:
    tensor = network.get_input(0)
    assert network.num_inputs == 1, "one input is expected"
    assert tensor.name == INPUT, f"the input is called {tensor.name}"
    shape = tuple(tensor.shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(
        INPUT, (tiles.smallest, *shape), (tiles.usual, *shape), (tiles.largest, *shape)
    )
    return profile


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Tactic timings of earlier builds; TensorRT ignores those of other versions and GPUs."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=True)
    return cache


def _set_compute_capability(trt: Any, config: Any, wanted: str | None) -> None:
    """Only TensorRT-RTX compiles for a GPU that is not there."""
    if wanted is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(compute_capability(trt, wanted), 0)
