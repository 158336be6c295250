"""The decoder by plain PyTorch, on any device.

Computes exactly what the numerics contract says (docs/numerics.md), so it is the oracle of every
faster path.
"""

from __future__ import annotations

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.decoder import causal_attention, embed, rms_norm, rope_tables
from runtime.decoder.models.kv_cache import PagedKVCache
from runtime.decoder.models.step import SequenceStep, logit_rows, positions_of, slots_of
from runtime.decoder.models.torch_weights import DecoderWeights


class PlainModel:
    """`DecoderModel` whose layers are `nvlm.model.decoder.DecoderLayer`."""

    def __init__(
        self,
        config: CheckpointConfig,
        weights: DecoderWeights,
        num_blocks: int,
        device: torch.device,
    ) -> None:
        self.embedding = weights.embedding
        self._decoder = config.decoder
        self._weights = weights
        self._device = device
        self._cache = PagedKVCache(config, num_blocks, weights.kv_scales, device)

    def warm_up(
        self, max_num_tokens: int, *, use_graphs: bool = False, answers_once: bool = False
    ) -> None:
        """Nothing is compiled or captured."""

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        weights, decoder = self._weights, self._decoder
        hidden = torch.cat([self._embed(step) for step in steps])  # [T, hidden_size]
        positions, slots = (each(steps).to(self._device) for each in (positions_of, slots_of))
        cos, sin = rope_tables(positions, decoder.head_dim, decoder.rope_theta)
        attention = PagedAttention(self._cache, steps, slots)
        for index, layer in enumerate(weights.layers):
            hidden = layer(hidden, cos, sin, attention, index)
        hidden = hidden[logit_rows(steps).to(self._device)]
        normed = rms_norm(hidden, weights.final_norm, decoder.rms_norm_eps)
        logits: torch.Tensor = weights.lm_head(normed)
        return logits

    def _embed(self, step: SequenceStep) -> torch.Tensor:
        token_ids = torch.tensor(step.token_ids, device=self._device)
        embedding, table = self._weights.embedding, step.prompt_table
        table = None if table is None else table.to(self._device)
        return embed(token_ids, embedding, table, embedding.dtype)


class PagedAttention:
    """`Attention` of each step's sequence over its own blocks of the cache.

    slots: [T] int64, where the step's rows go in the cache.
    """

    def __init__(self, cache: PagedKVCache, steps: list[SequenceStep], slots: torch.Tensor) -> None:
        self._cache, self._steps, self._slots = cache, steps, slots
        self._counts = [len(step.token_ids) for step in steps]

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Writes k and v to the cache first."""
        self._cache.write(layer, self._slots, k, v)
        outputs = []
        for step, rows in zip(self._steps, q.split(self._counts), strict=True):
            cached = self._cache.read(layer, step.blocks, step.end_position)
            outputs.append(causal_attention(rows, *cached, step.first_position))
        return torch.cat(outputs).to(q.dtype)
