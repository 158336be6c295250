"""What a conversion takes and what its result fits: bytes, memory, time, GPUs; from shapes alone.

Builds on nvlm/planning/memory_plan.py, which counts the bytes of ranks and caches.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.mapping import check_divides
from nvlm.formats.tensor_names import model_tensors
from nvlm.model.config import NVLMConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import FP8, UNQUANTIZED
from nvlm.planning import memory_plan
from nvlm.planning.limits import derive_limits
from nvlm.program.errors import UserError

_PROCESS_BYTES = 500 << 20  # Python, torch and its threads
_BUFFER_BYTES = 256 << 20  # blocks waiting to be written
_WINDOW_TOKENS, _WINDOW_TILES = 2048, 7  # calibrated at a time
_PROMPT_TOKENS = 128  # tokens of a calibration sample, beside its image

GPUS = {"H100 80 GB": 80e9, "H200 141 GB": 141e9}
TP_SIZES = (1, 2, 4, 8)
CONTEXTS = (4096, 8192, 32768)
_USABLE_SHARE = 0.95  # share of a GPU, beside its driver and libraries


@dataclass(frozen=True, slots=True)
class Speeds:
    """Speeds of the machine on which the conversion will run, measured there."""

    read_bytes_per_s: float  # from the model's disk
    write_bytes_per_s: float  # to the output's disk
    flops: float  # float32 operations a second


@dataclass(frozen=True, slots=True)
class GpuFit:
    """A rank's weights, vision included, on one GPU of a kind, and what is left for the cache."""

    gpu: str  # name of the kind
    tp_size: int  # ranks, one a GPU
    weight_bytes: int  # on one GPU
    cache_tokens: int  # of the KV cache; 0: the weights do not fit
    # How many fit, by context length in tokens; empty: the weights do not fit.
    requests: dict[int, int]


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will take and make."""

    input_bytes: int  # of tensors that are read
    rank_bytes: list[int]  # of each rank's file
    vision_bytes: int  # of the vision file
    calibration_disk_bytes: int  # there only while it runs
    peak_memory_bytes: int  # without the page cache
    streaming_seconds: float | None  # reading and writing; None: not measured
    calibration_seconds: float | None  # None: not measured
    gpus: list[GpuFit]  # which machines the result fits
    scale_dtype: str | None  # what the linears' scales are rounded up to; None: they have none

    @property
    def output_bytes(self) -> int:
        return sum(self.rank_bytes) + self.vision_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "output_bytes": self.output_bytes}

    def lines(self) -> list[str]:
        """The plan as lines for people."""
        ranks = " + ".join(f"{size / 1e9:.2f}" for size in self.rank_bytes)
        lines = [
            f"reads {self.input_bytes / 1e9:.2f} GB, writes {self.output_bytes / 1e9:.2f} GB",
            f"ranks {ranks} GB, vision {self.vision_bytes / 1e9:.2f} GB",
            f"peak memory {self.peak_memory_bytes / 1e9:.1f} GB, page cache aside",
            f"{self.calibration_disk_bytes / 1e9:.2f} GB more disk while it calibrates",
        ]
        if self.streaming_seconds is not None and self.calibration_seconds is not None:
            lines.append(
                f"about {_duration(self.streaming_seconds)} of reading and writing and "
                f"{_duration(self.calibration_seconds)} of calibration"
            )
        if self.scale_dtype is not None:
            lines.append(
                f"scales of linears are amax / {FP8.largest:.0f}, rounded up to "
                f"{self.scale_dtype}, to which TensorRT-LLM casts them"
            )
        header = "".join(f"{f'at {context}':>10}" for context in CONTEXTS)
        lines.append(f"{'fits':<12} {'TP':>3} {'weights':>10} {'cache':>12}  requests{header}")
        for fit in self.gpus:
            counts = "".join(f"{fit.requests.get(context, 0):>10}" for context in CONTEXTS)
            what = f"{fit.cache_tokens:>5,} tok" if fit.cache_tokens else "does not fit"
            lines.append(
                f"{fit.gpu:<12} {fit.tp_size:>3} {fit.weight_bytes / 1e9:>7.1f} GB {what:>12}"
                f"          {counts}"
            )
        return lines


def plan_conversion(
    model: NVLMConfig, config: CheckpointConfig, num_samples: int, speeds: Speeds | None
) -> ConversionPlan:
    """`num_samples` calibration samples, each counted with one image of the largest grid; 0 for
    no calibration."""
    vision = model.vision
    input_bytes = sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in model_tensors(model)
    )
    rank_bytes = [
        memory_plan.decoder_weight_bytes(config, rank) for rank in range(config.world_size)
    ]
    vision_bytes = memory_plan.vision_weight_bytes(vision, config.dtype)
    num_tiles = num_samples * model.tiling.max_tiles_per_image
    num_tokens = num_tiles * vision.tokens_per_tile + num_samples * _PROMPT_TOKENS
    streaming = calibrating = None
    if speeds is not None:
        output_bytes = sum(rank_bytes) + vision_bytes
        streaming = input_bytes / speeds.read_bytes_per_s
        streaming += output_bytes / speeds.write_bytes_per_s
        calibrating = _calibration_flops(model, config, num_tiles, num_tokens) / speeds.flops
    return ConversionPlan(
        input_bytes,
        rank_bytes,
        vision_bytes,
        memory_plan.calibration_bytes(config, vision, num_tiles, num_tokens),
        peak_memory_bytes(model, config, is_calibrated=num_samples > 0),
        streaming,
        calibrating,
        [_gpu_fit(model, config, gpu, tp) for gpu in GPUS for tp in _tp_sizes(config)],
        config.dtype if config.weight_format.scale_shapes else None,
    )


def peak_memory_bytes(model: NVLMConfig, config: CheckpointConfig, *, is_calibrated: bool) -> int:
    """The converter's own memory, on a CPU, from a source that maps its files: does not depend on
    the number of layers, samples or ranks."""
    vision, decoder = model.vision, model.decoder
    base = _PROCESS_BYTES + _BUFFER_BYTES
    if not is_calibrated:
        return base
    itemsize = TORCH_DTYPES[config.dtype].itemsize
    widest = 4 * decoder.intermediate_size * decoder.hidden_size
    rows = (decoder.num_attention_heads + 2 * decoder.num_key_value_heads) * decoder.head_dim
    stacked = itemsize * rows * decoder.hidden_size
    activations = memory_plan.mlp_activation_bytes(_WINDOW_TOKENS, decoder.intermediate_size)
    layer = 4 * (
        4 * vision.attention_size * vision.hidden_size
        + 2 * vision.intermediate_size * vision.hidden_size
    )
    hidden = 4 * _WINDOW_TILES * vision.num_positions * vision.intermediate_size
    projector = (
        4 * vision.projector_hidden_size * (vision.projector_input_size + vision.output_size)
    )
    tokens = 4 * _WINDOW_TILES * vision.tokens_per_tile * vision.projector_hidden_size
    head = 0  # its cast copy, where it is measured and published in another type
    if config.head_format is not UNQUANTIZED and config.dtype != "bfloat16":
        head = itemsize * decoder.vocab_size * decoder.hidden_size
    return base + max(
        widest + stacked + activations, layer + 3 * hidden, projector + 3 * tokens, head
    )


def _calibration_flops(
    model: NVLMConfig, config: CheckpointConfig, num_tiles: int, num_tokens: int
) -> float:
    """Multiplications and additions of the linears; attention is small beside them."""
    whole = replace(config, tp_size=1, pp_size=1)
    tables = 2 * model.decoder.vocab_size * model.decoder.hidden_size
    decoder = memory_plan.decoder_parameter_count(whole) - tables
    vision = memory_plan.vision_parameter_count(model.vision)
    return 2.0 * (decoder * num_tokens + vision * num_tiles * model.vision.num_positions)


def _tp_sizes(config: CheckpointConfig) -> list[int]:
    sizes = []
    for tp_size in TP_SIZES:
        try:
            check_divides(config.decoder, tp_size, 1)
        except UserError:
            continue
        sizes.append(tp_size)
    return sizes


def _gpu_fit(model: NVLMConfig, config: CheckpointConfig, gpu: str, tp_size: int) -> GpuFit:
    """Rank 0, with vision in the checkpoint's dtype, one image a request, default limits."""
    rank = replace(config, tp_size=tp_size, pp_size=1)
    weights = memory_plan.decoder_weight_bytes(rank) + memory_plan.vision_weight_bytes(
        model.vision, config.dtype
    )
    limits = derive_limits(model.decoder, model.tiling, model.vision.tokens_per_tile)
    workspace = memory_plan.workspace_bytes(rank, limits)
    left = int(_USABLE_SHARE * GPUS[gpu]) - weights - workspace
    cache_tokens = max(0, left) // memory_plan.kv_bytes_per_token(rank)
    requests = {context: cache_tokens // context for context in CONTEXTS}
    return GpuFit(gpu, tp_size, weights, cache_tokens, requests)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
