"""Which model runs an engine on a device, and how many KV blocks it has room for."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from nvlm.formats import layout
from nvlm.formats.safetensors_reader import TensorSource
from nvlm.planning import hopper
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.memory_plan import decoder_workspace_bytes, plan_engine
from nvlm.program.errors import UserError
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.read_ahead import reading_ahead
from runtime.decoder.models.step import DecoderModel
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.decoder.scheduler import max_num_blocks
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on
from runtime.ranks.mpi import Job, World
from runtime.ranks.parallel_decoder import ParallelModel
from runtime.ranks.process_group import ProcessGroup


@dataclass(frozen=True, slots=True)
class OpenedModel:
    model: DecoderModel
    num_blocks: int


def open_model(
    engine: EngineDir,
    device: torch.device,
    source: TensorSource | None = None,
    group: ProcessGroup | None = None,
    *,
    use_graphs: bool | None = None,
) -> OpenedModel:
    """source: of the weights, by default the rank's file. use_graphs: by default on one GPU; a
    group's would hold its reductions, which no two GPUs have run yet. Collective where there is a
    group."""
    config, limits = engine.checkpoint_config, engine.limits
    rank, all_reduce = (0, None) if group is None else (group.rank, group.all_reduce)
    use_graphs = group is None if use_graphs is None else use_graphs
    agree = Job(World()).agree if group is None else group.job.agree
    num_blocks = agree(lambda: _num_blocks(engine, device, group))
    if group is not None:  # one scheduler's numbers must hold on every rank
        num_blocks = min(group.job.gather(num_blocks))
    file = engine.directory / layout.LLM / layout.rank_file(rank)
    opened = source or agree(lambda: open_weights(file.parent, config, rank))
    own: DecoderModel
    if hopper.takes_fast_path(config, device):
        from runtime.decoder.kernels.triton_forms import TritonForms

        def load() -> tuple[HopperModel, torch.Tensor]:
            with loading_on(device, engine), nullcontext() if source else reading_ahead(file):
                on_gpu = load_hopper_weights(opened, config, device)
                model = HopperModel(
                    config,
                    limits.max_batch_size,
                    limits.max_seq_len,
                    on_gpu,
                    num_blocks,
                    device,
                    TritonForms(device),
                    all_reduce=all_reduce,
                )
            return model, on_gpu.embedding

        fast, embedding = agree(load)
        with loading_on(device, engine) if group is None else nullcontext():
            if use_graphs:
                fast.capture_graphs()
            fast.warm_up(limits.max_num_tokens)
        own = fast
    else:
        weights = agree(lambda: load_weights(opened, config, device, all_reduce))
        embedding = weights.embedding
        own = PlainModel(config, weights, num_blocks, device)
    if group is None:
        return OpenedModel(own, num_blocks)
    model = ParallelModel(own, group, embedding, config.decoder.vocab_size)
    return OpenedModel(model, num_blocks)


def _num_blocks(engine: EngineDir, device: torch.device, group: ProcessGroup | None) -> int:
    """All that the limits can use, on a GPU as many as it has room for, but one longest request's
    at least."""
    limits, memory_bytes = engine.limits, total_memory_bytes(device)
    plan = plan_engine(
        engine.checkpoint_config,
        engine.vision_config,
        engine.vision_precision,
        limits,
        device,
        memory_bytes,
    )
    wanted = max_num_blocks(limits)
    num_tokens = limits.max_batch_size * limits.max_seq_len
    block_bytes = TOKENS_PER_BLOCK * plan.kv_cache_bytes // num_tokens
    # A CPU maps its weights and can page them; the cache has to be there.
    other_bytes = 0
    if device.type == "cuda":
        workspace_bytes = decoder_workspace_bytes(
            engine.checkpoint_config, limits, device, memory_bytes
        )
        workspace_bytes += plan.prompt_table_bytes
        other_bytes = plan.decoder_weight_bytes + workspace_bytes
        torch.cuda.empty_cache()  # what reading vision's weights left; its graphs are there
        memory_bytes, _ = torch.cuda.mem_get_info(device)
    elif group is not None:
        memory_bytes //= group.job.world.local_size  # ranks of one machine share it
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
            f"{plan.decoder_weight_bytes / 1e9:.1f}, workspace {workspace_bytes / 1e9:.1f} "
            f"and, for one request of {longest * TOKENS_PER_BLOCK} tokens, KV cache "
            f"{longest * block_bytes / 1e9:.1f}; build it with a smaller --max_seq_len or "
            "--max_num_tokens, or convert with --tp_size 2"
        )
    return num_blocks
