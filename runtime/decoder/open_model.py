"""Which model runs an engine on a device, and how many KV blocks it has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nvlm.checkpoint_config import CheckpointConfig
from nvlm.checkpoint_tensors import rank_file
from nvlm.errors import UserError
from nvlm.limits import EngineLimits
from nvlm.memory import total_memory_bytes
from nvlm.plan import EnginePlan, plan_engine
from nvlm.read_ahead import reading_ahead
from nvlm.tensor_source import TensorSource
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.hopper_model import HopperModel
from runtime.decoder.hopper_weights import load_hopper_weights
from runtime.decoder.plain_model import PlainModel
from runtime.decoder.step import DecoderModel
from runtime.decoder.torch_weights import load_weights, open_weights
from runtime.engine_dir import EngineDir
from runtime.kernels import hopper


@dataclass(frozen=True, slots=True)
class OpenedModel:
    model: DecoderModel
    num_blocks: int


def max_num_blocks(limits: EngineLimits) -> int:
    """Every place of the batch has room for max_seq_len."""
    return limits.max_batch_size * num_blocks_for(limits.max_seq_len)


def takes_fast_path(config: CheckpointConfig, device: torch.device) -> bool:
    is_fp8 = config.quant_algo == config.kv_cache_quant_algo == "FP8"
    return is_fp8 and config.dtype != "float32" and hopper.has_kernels(device)


def open_model(
    engine: EngineDir,
    device: torch.device,
    source: TensorSource | None = None,
    *,
    use_graphs: bool = True,
    **forms: Any,
) -> OpenedModel:
    """source: of the weights, by default the engine's file. forms: settings of `TritonForms`."""
    config, limits = engine.checkpoint_config, engine.limits
    memory_bytes = total_memory_bytes(device)
    plan = plan_engine(
        config, engine.vision.vision, engine.vision_precision, limits, device, memory_bytes
    )
    num_blocks = _num_blocks(engine, device, plan, memory_bytes)
    directory = engine.directory / "llm"
    if not takes_fast_path(config, device):
        weights = load_weights(source or open_weights(directory, config), config, device)
        return OpenedModel(PlainModel(config, weights, num_blocks, device), num_blocks)
    if source is None:
        with reading_ahead(directory / rank_file(0)):
            weights_on_gpu = load_hopper_weights(open_weights(directory, config), config, device)
    else:
        weights_on_gpu = load_hopper_weights(source, config, device)
    from runtime.decoder.kernels.triton_forms import TritonForms

    model = HopperModel(
        config,
        limits.max_batch_size,
        limits.max_seq_len,
        weights_on_gpu,
        num_blocks,
        device,
        TritonForms(device, **forms),
        use_graphs=use_graphs,
    )
    return OpenedModel(model, num_blocks)


def _num_blocks(
    engine: EngineDir, device: torch.device, plan: EnginePlan, memory_bytes: int
) -> int:
    """All that the limits can use, on a GPU as many as it has room for, but one longest request's
    at least."""
    limits = engine.limits
    wanted = max_num_blocks(limits)
    num_tokens = limits.max_batch_size * limits.max_seq_len
    block_bytes = TOKENS_PER_BLOCK * plan.kv_cache_bytes // num_tokens
    # A CPU maps its weights and can page them; the cache has to be there.
    other_bytes = 0
    if device.type == "cuda":
        memory_bytes, _ = torch.cuda.mem_get_info(device)
        other_bytes = plan.decoder_weight_bytes + plan.workspace_bytes
    if device.type == "cpu" and plan.kv_cache_bytes > memory_bytes:
        raise UserError(
            f"the KV cache of {engine.directory} takes {plan.kv_cache_bytes / 1e9:.1f} GB of "
            f"{device}'s {memory_bytes / 1e9:.1f} GB; build it with a smaller --max_batch_size or "
            "--max_seq_len"
        )
    if device.type == "cpu":
        return wanted
    num_blocks = min(wanted, (memory_bytes - other_bytes) // block_bytes)
    longest = num_blocks_for(limits.max_seq_len)
    if num_blocks < longest:
        raise UserError(
            f"{engine.directory} needs {(other_bytes + longest * block_bytes) / 1e9:.1f} GB of "
            f"{device}, where {memory_bytes / 1e9:.1f} GB are free: weights "
            f"{plan.decoder_weight_bytes / 1e9:.1f}, workspace {plan.workspace_bytes / 1e9:.1f} "
            f"and, for one request of {longest * TOKENS_PER_BLOCK} tokens, KV cache "
            f"{longest * block_bytes / 1e9:.1f}; build it with a smaller --max_seq_len or "
            "--max_num_tokens, or convert with --tp_size 2"
        )
    return num_blocks
