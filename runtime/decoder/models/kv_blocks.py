"""How many blocks of KV cache an engine gets on a device."""

from __future__ import annotations

import torch

from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.memory_plan import EnginePlan, decoder_workspace_bytes, plan_engine
from nvlm.program.errors import UserError
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.scheduler import max_num_blocks
from runtime.engine.engine_dir import EngineDir


def count_blocks(
    engine: EngineDir,
    device: torch.device,
    num_sharing: int = 1,
    *,
    cache_fraction: float | None = None,
) -> int:
    """num_sharing: the ranks that share a machine's memory. cache_fraction: of a GPU's memory that
    is free after loading, at most so much; None is all that the limits can use.

    Raises `UserError` where the device has too little, and for a fraction on a CPU.
    """
    if device.type != "cpu":
        return _count_gpu_blocks(engine, device, cache_fraction)
    if cache_fraction is not None:
        raise UserError(
            f"--kv_cache_free_gpu_memory_fraction {cache_fraction} is of a GPU's memory, and "
            f"{engine.directory} runs on a CPU, where the cache has what the engine's limits can "
            "use; leave it out, or build with a smaller --max_batch_size or --max_seq_len"
        )
    return _count_cpu_blocks(engine, device, num_sharing)


def _count_cpu_blocks(engine: EngineDir, device: torch.device, num_sharing: int) -> int:
    """All that the limits can use. A CPU maps its weights and can page them; the cache has to be
    there."""
    memory_bytes = total_memory_bytes(device)
    plan = _plan(engine, device, memory_bytes)
    memory_bytes //= num_sharing
    if plan.kv_cache_bytes > memory_bytes:
        raise UserError(
            f"the KV cache of {engine.directory} takes {plan.kv_cache_bytes / 1e9:.1f} GB of "
            f"{device}'s {memory_bytes / 1e9:.1f} GB; build it with a smaller --max_batch_size or "
            "--max_seq_len"
        )
    return max_num_blocks(engine.limits)


def _count_gpu_blocks(engine: EngineDir, device: torch.device, cache_fraction: float | None) -> int:
    """As many as the GPU, or the fraction of it, has room for, at most all that the limits can use,
    at least those of one longest request."""
    limits, memory_bytes = engine.limits, total_memory_bytes(device)
    plan = _plan(engine, device, memory_bytes)
    workspace_bytes = plan.prompt_table_bytes + decoder_workspace_bytes(
        engine.checkpoint_config, limits, device, memory_bytes
    )
    other_bytes = plan.decoder_weight_bytes + workspace_bytes
    num_tokens = limits.max_batch_size * limits.max_seq_len
    block_bytes = TOKENS_PER_BLOCK * plan.kv_cache_bytes // num_tokens
    torch.cuda.empty_cache()  # what reading vision's weights left; its graphs are there
    free_bytes, _ = torch.cuda.mem_get_info(device)
    free_after = max(0, free_bytes - other_bytes)
    cache_bytes = free_after if cache_fraction is None else int(cache_fraction * free_after)
    num_blocks = min(max_num_blocks(limits), cache_bytes // block_bytes)
    longest = num_blocks_for(limits.max_seq_len)
    if num_blocks < longest <= free_after // block_bytes:
        raise UserError(
            f"--kv_cache_free_gpu_memory_fraction {cache_fraction} leaves "
            f"{cache_bytes / 1e9:.1f} GB for the KV cache of {engine.directory}, expected "
            f"{longest * block_bytes / 1e9:.1f} or more, for one request of "
            f"{longest * TOKENS_PER_BLOCK} tokens; raise it"
        )
    if num_blocks < longest:
        raise UserError(
            f"{engine.directory} needs {(other_bytes + longest * block_bytes) / 1e9:.1f} GB of "
            f"{device}, where {free_bytes / 1e9:.1f} GB are free: weights "
            f"{plan.decoder_weight_bytes / 1e9:.1f}, workspace {workspace_bytes / 1e9:.1f} "
            f"and, for one request of {longest * TOKENS_PER_BLOCK} tokens, KV cache "
            f"{longest * block_bytes / 1e9:.1f}; build it with a smaller --max_seq_len or "
            "--max_num_tokens, or convert with --tp_size 2"
        )
    return num_blocks


def _plan(engine: EngineDir, device: torch.device, memory_bytes: int) -> EnginePlan:
    return plan_engine(
        engine.checkpoint_config,
        engine.vision_config,
        engine.vision_precision,
        engine.limits,
        device,
        memory_bytes,
    )
