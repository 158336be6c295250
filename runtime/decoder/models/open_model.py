"""Which model runs an engine on a device: loads it and gets it ready for its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvlm.formats import layout
from nvlm.formats.safetensors_reader import TensorSource
from nvlm.model.decoder import AllReduce
from nvlm.planning import hopper
from nvlm.program import startup
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import AllReduceNorm, CollectiveAllReduceNorm
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.kv_blocks import count_blocks
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import DecoderModel
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on


@dataclass(frozen=True, slots=True)
class OpenedModel:
    model: DecoderModel  # ready for its first step
    num_blocks: int  # of its KV cache


def open_model(
    engine: EngineDir,
    device: torch.device,
    source: TensorSource | None = None,
    *,
    use_graphs: bool = True,
    cache_fraction: float | None = None,
    answers_once: bool = False,
) -> OpenedModel:
    """The model of an engine of one rank (of several: runtime/ranks). source: of the weights, by
    default the engine's file. use_graphs: on the fast path. cache_fraction: as in
    `count_blocks`. answers_once: as in `HopperModel.warm_up`."""
    num_blocks = count_blocks(engine, device, cache_fraction=cache_fraction)
    with startup.phase("decoder weights"):
        model = load_model(engine, device, num_blocks, source)
    with startup.phase("decoder kernels and graphs"), loading_on(device, engine):
        model.warm_up(
            engine.limits.max_num_tokens, use_graphs=use_graphs, answers_once=answers_once
        )
    return OpenedModel(model, num_blocks)


def load_model(
    engine: EngineDir,
    device: torch.device,
    num_blocks: int,
    source: TensorSource | None = None,
    *,
    rank: int = 0,
    all_reduce: AllReduce | None = None,
    all_reduce_norm: Callable[[PlainForms], AllReduceNorm] | None = None,
) -> HopperModel | PlainModel:
    """`rank`'s shard with a KV cache of `num_blocks`, before its warm-up. all_reduce: where there
    are more ranks. all_reduce_norm: makes what the fast path takes instead of it, if anything.
    Raises `UserError` for what keeps the device from loading it."""
    if hopper.takes_fast_path(engine.checkpoint_config, device):
        from runtime.decoder.kernels.triton_forms import TritonForms

        forms, sums = TritonForms(device), None
        if all_reduce_norm is not None:
            sums = all_reduce_norm(forms)
        elif all_reduce is not None:
            sums = CollectiveAllReduceNorm(forms, all_reduce)
        return _load_hopper_model(engine, device, num_blocks, source, rank, forms, sums)
    return _load_plain_model(engine, device, num_blocks, source, rank, all_reduce)


def _load_plain_model(
    engine: EngineDir,
    device: torch.device,
    num_blocks: int,
    source: TensorSource | None,
    rank: int,
    all_reduce: AllReduce | None,
) -> PlainModel:
    config = engine.checkpoint_config
    source = source or open_weights(engine.directory / layout.LLM, config, rank)
    weights = load_weights(source, config, device, all_reduce)
    return PlainModel(config, weights, num_blocks, device)


def _load_hopper_model(
    engine: EngineDir,
    device: torch.device,
    num_blocks: int,
    source: TensorSource | None,
    rank: int,
    forms: PlainForms,
    all_reduce_norm: AllReduceNorm | None,
) -> HopperModel:
    config, limits = engine.checkpoint_config, engine.limits
    source = source or open_weights(engine.directory / layout.LLM, config, rank)
    with loading_on(device, engine):
        weights = load_hopper_weights(source, config, device)
        return HopperModel(
            config,
            limits.max_batch_size,
            limits.max_seq_len,
            weights,
            num_blocks,
            device,
            forms,
            all_reduce_norm=all_reduce_norm,
        )
