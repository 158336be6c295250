"""The paged KV cache: keys and values of every layer, in blocks of `TOKENS_PER_BLOCK` positions."""

from __future__ import annotations

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model import fp8
from nvlm.model.dtypes import TORCH_DTYPES
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK


class PagedKVCache:
    """Storage [layers, 2, num_blocks, a rank's kv_heads, TOKENS_PER_BLOCK, head_dim]: what one KV
    head reads of a block lies together.

    FP8: e4m3(clamp(x / scale)) with one scale a layer. A CPU holds the same values as bfloat16
    (every e4m3 number is one), which it widens twenty times faster.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        num_blocks: int,
        scales: list[float] | None,
        device: torch.device,
    ) -> None:
        decoder = config.decoder
        assert (scales is not None) == (config.kv_cache_quant_algo == "FP8")
        self._scales = None if scales is None else torch.tensor(scales, device=device)
        dtype = TORCH_DTYPES[config.dtype]
        if scales is not None:
            dtype = torch.bfloat16 if device.type == "cpu" else fp8.E4M3
        self._storage = torch.empty(
            *(decoder.num_hidden_layers, 2, num_blocks),
            *(config.mapping().local_heads(decoder.num_key_value_heads), TOKENS_PER_BLOCK),
            decoder.head_dim,
            dtype=dtype,
            device=device,
        )

    def slots(self, blocks: list[int], first: int, count: int) -> torch.Tensor:
        """Where positions first .. first + count - 1 of a sequence lie: [count] int64."""
        positions = torch.arange(first, first + count)
        table = torch.tensor(blocks)
        slots = table[positions // TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK
        return (slots + positions % TOKENS_PER_BLOCK).to(self._storage.device)

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as stored: [num_blocks, kv_heads, TOKENS_PER_BLOCK, head_dim] each."""
        return self._storage[layer, 0], self._storage[layer, 1]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [num_tokens, kv_heads, head_dim], K after bias and RoPE, V after bias."""
        blocks, places = slots // TOKENS_PER_BLOCK, slots % TOKENS_PER_BLOCK
        for index, x in enumerate((k, v)):
            if self._scales is not None:
                x = fp8.quantize(x, self._scales[layer])
            self._storage[layer, index][blocks, :, places] = x.to(self._storage.dtype)

    def read(self, layer: int, blocks: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the first `length` positions: float32 [length, kv_heads, head_dim] each."""
        table = torch.tensor(blocks[: -(-length // TOKENS_PER_BLOCK)], device=self._storage.device)
        rows = self._storage[layer][:, table].transpose(2, 3).flatten(1, 2)[:, :length]
        if self._scales is None:
            rows = rows.to(torch.float32)
        else:
            rows = fp8.dequantize(rows, self._scales[layer])
        return rows[0], rows[1]
