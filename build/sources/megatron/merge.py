"""How the shards of Megatron's tensor-parallel ranks become published tensors.

Each function takes one tensor's shards in rank order and returns the published tensor; with one
rank, and no reordering, that is a view of the file. Peak memory: the tensor returned.

Megatron fuses q, k and v by query group: the rows of a rank are, for each of its groups, the
group's query heads, its key head and its value head (megatron/core/transformer/attention.py,
get_query_key_value_tensors). The ViT has as many groups as heads. A gated MLP's rank holds its rows
of the gate, then its rows of up (megatron/core/transformer/mlp.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nvlm.model.config import NVLMConfig, exact_div

Shards = list[torch.Tensor]
Merge = Callable[[Shards, NVLMConfig], torch.Tensor]


def _join(parts: Shards, dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def replicated(shards: Shards, _: NVLMConfig) -> torch.Tensor:
    """Every rank has the whole tensor."""
    return shards[0]


def positions(shards: Shards, _: NVLMConfig) -> torch.Tensor:
    """[N, H] on every rank -> [1, N, H]."""
    return shards[0].unsqueeze(0)


def rows(shards: Shards, _: NVLMConfig) -> torch.Tensor:
    """Column-parallel: [out / tp, ...] -> [out, ...]."""
    return _join(shards, 0)


def columns(shards: Shards, _: NVLMConfig) -> torch.Tensor:
    """Row-parallel: [out, in / tp] -> [out, in]."""
    return _join(shards, 1)


def gate(shards: Shards, _: NVLMConfig) -> torch.Tensor:
    """[2 F / tp, D] -> [F, D]."""
    return _join([shard[: exact_div(len(shard), 2)] for shard in shards], 0)


def up(shards: Shards, _: NVLMConfig) -> torch.Tensor:
    """[2 F / tp, D] -> [F, D]."""
    return _join([shard[exact_div(len(shard), 2) :] for shard in shards], 0)


def q(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[(Q + 2 K) / tp, ...] -> [Q, ...]."""
    return _of_groups(shards, config, 0, _heads_per_group(config))


def k(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[(Q + 2 K) / tp, ...] -> [K, ...]."""
    heads = _heads_per_group(config)
    return _of_groups(shards, config, heads, heads + 1)


def v(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[(Q + 2 K) / tp, ...] -> [K, ...]."""
    heads = _heads_per_group(config)
    return _of_groups(shards, config, heads + 1, heads + 2)


def _heads_per_group(config: NVLMConfig) -> int:
    """Query heads."""
    return exact_div(config.decoder.num_attention_heads, config.decoder.num_key_value_heads)


def _of_groups(shards: Shards, config: NVLMConfig, first: int, end: int) -> torch.Tensor:
    """The rows of heads `first` to `end` of every query group."""
    head_dim = config.decoder.head_dim
    rows_per_group = (_heads_per_group(config) + 2) * head_dim
    groups = [shard.unflatten(0, (-1, rows_per_group)) for shard in shards]
    return _join([g[:, first * head_dim : end * head_dim] for g in groups], 0).flatten(0, 1)


def vocabulary(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[V' / tp, D] -> [V, D]: without Megatron's padding, or padded as Megatron pads it.

    The rows beyond the tokenizer's tokens mean nothing. Copies of the last one, unlike zeros, do
    not give lm_head logits that may exceed all others.
    """
    missing = config.decoder.vocab_size - sum(map(len, shards))
    if missing > 0:
        shards = [*shards, shards[-1][-1:].expand(missing, -1)]
    return _join(shards, 0)[: config.decoder.vocab_size]


def vision_qkv(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[3 A' / tp, H], q, k and v of a head after one another -> [3 A, H]: all of q, of k, of v."""
    vision = config.vision
    result = shards[0].new_zeros(3, vision.num_stored_heads, vision.head_dim, vision.hidden_size)
    heads = torch.cat([s.unflatten(0, (-1, 3, vision.head_dim)) for s in shards])
    result[:, : len(heads)] = heads.transpose(0, 1)
    return result.flatten(0, 2)


def vision_rows(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[A' / tp] -> [A], with zeros for the dummy heads that are not stored."""
    result = shards[0].new_zeros(config.vision.attention_size)
    stored = _join(shards, 0)
    result[: len(stored)] = stored
    return result


def vision_columns(shards: Shards, config: NVLMConfig) -> torch.Tensor:
    """[H, A' / tp] -> [H, A], with zeros for the dummy heads that are not stored."""
    result = shards[0].new_zeros(config.vision.hidden_size, config.vision.attention_size)
    stored = _join(shards, 1)
    result[:, : stored.shape[1]] = stored
    return result
