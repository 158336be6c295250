"""The paged KV cache: keys and values of every layer, in blocks of `TOKENS_PER_BLOCK` positions."""

from __future__ import annotations

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.dtypes import TORCH_DTYPES
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.kernels.operands import CacheScale, KVPages
from runtime.decoder.models.kv_scales import LayerScales


class PagedKVCache:
    """Storage [layers, 2, num_blocks, a rank's kv_heads, TOKENS_PER_BLOCK, head_dim]: what one KV
    head reads of a block lies together.

    Quantised where the checkpoint says so and its engine does not say otherwise, and held as the
    number format says for the device. scales: of each layer's K and V.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        num_blocks: int,
        scales: list[LayerScales] | None,
        device: torch.device,
    ) -> None:
        decoder, self._format = config.decoder, config.kv_cache_format
        assert (scales is not None) == bool(self._format.scale_shapes)
        pairs = scales or [(1.0, 1.0)] * decoder.num_hidden_layers
        self._scales = torch.tensor(pairs, device=device)  # [layers, 2]
        self._storage = torch.empty(
            *(decoder.num_hidden_layers, 2, num_blocks),
            *(config.mapping().local_heads(decoder.num_key_value_heads), TOKENS_PER_BLOCK),
            decoder.head_dim,
            dtype=self._format.cache_dtype(TORCH_DTYPES[config.dtype], device),
            device=device,
        )

    def pages(self, layer: int) -> KVPages:
        """K and V as stored."""
        scales: list[CacheScale | None] = [None, None]
        if self._format.scale_shapes:
            scales = [CacheScale(each.clone(), float(each)) for each in self._scales[layer]]
        return KVPages(self._storage[layer, 0], self._storage[layer, 1], *scales)

    def context_memory(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the keys and the values that a layer's attention gathers, without their scales:
        two [kv_heads, num_positions, head_dim up to a power of 2]. float16 holds e4m3 exactly."""
        _, _, _, kv_heads, _, head_dim = self._storage.shape
        shape = (kv_heads, num_positions, 1 << (head_dim - 1).bit_length())
        dtype = torch.float16 if self._format.scale_shapes else self._storage.dtype
        k, v = (torch.empty(shape, dtype=dtype, device=self._storage.device) for _ in range(2))
        return k, v

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [num_tokens, kv_heads, head_dim], K after bias and RoPE, V after bias."""
        blocks, places = slots // TOKENS_PER_BLOCK, slots % TOKENS_PER_BLOCK
        for index, x in enumerate((k, v)):
            stored = self._format.quantize(x, self._scales[layer, index])
            self._storage[layer, index][blocks, :, places] = stored.to(self._storage.dtype)

    def read(self, layer: int, blocks: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the first `length` positions: float32 [length, kv_heads, head_dim] each."""
        table = torch.tensor(blocks[: num_blocks_for(length)], device=self._storage.device)
        rows = self._storage[layer][:, table].transpose(2, 3).flatten(1, 2)[:, :length]
        k, v = self._format.dequantize(rows, self._scales[layer][:, None, None, None])
        return k, v
