"""Decoder target `tensorrt_llm`: checkpoint directory -> config.json and rank{r}.engine.

TensorRT-LLM 1.2.1's own builder reads the checkpoint; this chooses its settings. Reasons for the
plugin choices: TensorRT-LLM's "Useful Build-Time Flags" (docs/source/legacy/performance).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.planning.limits import EngineLimits
from nvlm.planning.tensorrt_llm_package import INSTALL, load_tensorrt_llm, stdout_to_stderr
from nvlm.program.errors import UserError, cut

OptimizeFor = Literal["latency", "throughput"]
DEFAULT_OPTIMIZE_FOR: OptimizeFor = "throughput"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecoderBuildOptions:
    """How to compile the decoder."""

    optimize_for: OptimizeFor  # what the plugins are tuned for
    workers: int  # ranks built at a time, one GPU each
    timing_cache: Path | None = None  # file that is read, if there, and written


def plugin_settings(config: CheckpointConfig, optimize_for: OptimizeFor) -> dict[str, Any]:
    """Keywords of PluginConfig.

    FP8: small batches read weights at the speed of memory, which the low-latency GEMMs reach;
    large ones are left to TensorRT's FP8 kernels and the fused GEMM + SwiGLU. That fusion uses one
    scale for both halves, which the checkpoint has. Other types take the GEMM plugin.
    """
    is_fp8 = config.quant_algo == "FP8"
    settings: dict[str, Any] = {
        "dtype": config.dtype,
        "gpt_attention_plugin": "auto",
        "context_fmha": True,
        "remove_input_padding": True,
        "tokens_per_block": 32,
        # FP8 attention in the context phase needs the FP8 cache; the paged kind is what chunked
        # context and reuse of KV blocks stand on.
        "use_fp8_context_fmha": is_fp8 and config.kv_cache_quant_algo == "FP8",
        "use_paged_context_fmha": True,
        "use_fused_mlp": True,
        "nccl_plugin": "auto" if config.world_size > 1 else None,
        "multiple_profiles": optimize_for == "throughput",  # better kernels, a longer build
    }
    if not is_fp8:
        return {**settings, "gemm_plugin": "auto"}
    if optimize_for == "latency":
        return {
            **settings,
            "low_latency_gemm_plugin": "fp8",
            "low_latency_gemm_swiglu_plugin": "fp8",
        }
    return {**settings, "gemm_plugin": None, "gemm_swiglu_plugin": "fp8"}


def plugin_config(config: CheckpointConfig, optimize_for: OptimizeFor) -> Any:
    """Make TensorRT-LLM's PluginConfig and read every setting back: decision 99
    (docs/decisions/engines.md).

    PluginConfig of 1.2.1 drops a name that it does not know without a word. Raises `UserError` that
    names such a setting, or one that reads otherwise than it was set, and the installed version.
    """
    package = load_tensorrt_llm()
    with stdout_to_stderr():
        from tensorrt_llm.plugin import PluginConfig

        settings = plugin_settings(config, optimize_for)
        unknown = [name for name in settings if name not in PluginConfig.model_fields]
        if unknown:
            raise UserError(
                f"tensorrt_llm {package.__version__} has no plugin setting {', '.join(unknown)}; "
                f"{INSTALL}"
            )
        try:
            plugins = PluginConfig(**settings)
        except ValueError as error:  # Pydantic's, which names the field
            reason = cut(" ".join(str(error).split()))
            raise UserError(
                f"tensorrt_llm {package.__version__} refuses our plugin settings ({reason}); "
                f"{INSTALL}"
            ) from None
    for name, value in settings.items():
        found, expected = getattr(plugins, name), config.dtype if value == "auto" else value
        if found != expected:
            raise UserError(
                f"plugin setting {name} of tensorrt_llm {package.__version__} reads as {found!r}, "
                f"expected {expected!r}; {INSTALL}"
            )
    return plugins


def build_settings(limits: EngineLimits, timing_cache: Path) -> dict[str, Any]:
    """Keywords of BuildConfig, without the plugins.

    max_prompt_embedding_table_size counts rows of a whole batch; the runtime gives a request a
    max_batch_size-th of it.
    """
    return {
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        "max_beam_width": 1,
        "max_prompt_embedding_table_size": limits.max_multimodal_len,
        "strongly_typed": True,
        "input_timing_cache": str(timing_cache) if timing_cache.is_file() else None,
        # Not optional: Pydantic refuses None, and the default is a file in the working directory.
        "output_timing_cache": str(timing_cache),
    }


def build_decoder(
    checkpoint_dir: Path,
    config: CheckpointConfig,
    limits: EngineLimits,
    options: DecoderBuildOptions,
    directory: Path,
) -> None:
    """Writes `config.json` and one `rank{r}.engine` a rank into `directory`, which exists.

    Host memory: one rank's shard a worker.
    """
    package = load_tensorrt_llm()
    with stdout_to_stderr():
        from tensorrt_llm.builder import BuildConfig
        from tensorrt_llm.commands.build import parallel_build
        from tensorrt_llm.models.modeling_utils import PretrainedConfig

        unkept = directory / layout.UNKEPT_TIMINGS
        timing_cache = options.timing_cache or unkept
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        plugins = plugin_config(config, options.optimize_for)
        workers = num_workers(options.workers, config.world_size, torch.cuda.device_count)
        log.info(
            "building %d rank(s) with tensorrt_llm %s for %s, %d at a time",
            *(config.world_size, package.__version__, options.optimize_for, workers),
        )
        parallel_build(
            PretrainedConfig.from_json_file(str(checkpoint_dir / layout.CONFIG)),
            str(checkpoint_dir),
            BuildConfig(
                **build_settings(limits, timing_cache),
                plugin_config=plugins,
            ),
            str(directory),
            workers=workers,
            log_level="warning",
        )
    unkept.unlink(missing_ok=True)
    for rank in range(config.world_size):
        engine = directory / layout.rank_engine(rank)
        assert engine.is_file(), f"TensorRT-LLM wrote no {engine.name}"
        log.info("%s: %.1f GB", engine.name, engine.stat().st_size / 1e9)


def num_workers(wanted: int, world_size: int, num_gpus: Callable[[], int]) -> int:
    """Number of builders: at most one a rank and one a GPU."""
    return max(1, min(wanted, world_size, num_gpus()))
