"""One Qwen2 decoder layer and the pieces around it, over flat token rows.

Rows of several requests lie one after another: [num_tokens, hidden_size]. Attention itself is
passed in (`Attention`), so the layer knows neither caches nor batches; calibration and the runtime
share it. Names follow the TensorRT-LLM checkpoint. Formulas: Qwen2 technical report
(arXiv 2407.10671); RMSNorm arXiv 1910.07467; RoPE arXiv 2104.09864; SwiGLU arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from nvlm.model.config import DecoderConfig
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import UNQUANTIZED, NumberFormat

AllReduce = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a float32 tensor over the ranks that share a layer."""

DECODER_LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
"""The linears of a layer, which a number format may quantise."""

SHARED_SCALE_LINEARS = ("mlp.fc", "mlp.gate")
"""TensorRT-LLM's fused MLP requantises both with the larger scale; one scale makes that exact."""


class Attention(Protocol):
    """Attends over the rows of a step; it alone knows their sequences and their cache."""

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim]; q and k after RoPE. Returns
        [T, heads, head_dim]. All are `dtype`. layer: its index in the model."""
        ...


_ROW_PARALLEL = ("attention.dense", "mlp.proj")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight in float32, rounded once to x's dtype."""
    x32 = x.to(torch.float32)
    normalised = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normalised * weight.to(torch.float32)).to(x.dtype)


def rope_tables(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2 j / head_dim): each [num_tokens, head_dim / 2] float32.

    Plain RoPE: the checkpoint's rope_scaling is dropped, decision 2 (docs/decisions/model.md).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-exponents / head_dim)
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates channel pairs (j, j + head_dim / 2) of x [T, heads, head_dim]; float32 inside."""
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, head_dim / 2]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int
) -> torch.Tensor:
    """Softmax attention of one sequence in float32.

    q: [T, heads, head_dim], the rows at positions first_position, first_position + 1, ...;
    k, v: [first_position + T, kv_heads, head_dim]. Returns float32 [T, heads, head_dim].
    """
    num_queries = q.shape[0]
    q, k, v = (x.to(torch.float32).transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, d]
    mask = None
    if num_queries > 1 and first_position > 0:
        query = torch.arange(first_position, first_position + num_queries, device=q.device)
        mask = torch.arange(k.shape[2], device=q.device)[None] <= query[:, None]
    attended = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=num_queries > 1 and mask is None, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU MLP; `tensors` maps the layer's TensorRT-LLM names.

    The linears are stored in `number_format`, or each in its own of a mapping by name, with scales
    beside them in `tensors`. On a rank of
    several the tensors are its shards, and `all_reduce` adds the row-parallel linears' float32
    outputs before they are rounded once (Megatron-LM, arXiv 1909.08053).
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, torch.Tensor],
        all_reduce: AllReduce | None = None,
        *,
        number_format: NumberFormat | Mapping[str, NumberFormat] = UNQUANTIZED,
    ) -> None:
        super().__init__()
        formats = number_format
        if isinstance(formats, NumberFormat):
            formats = dict.fromkeys(DECODER_LINEARS, formats)
        self.all_reduce = all_reduce
        self.eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        self.input_layernorm = tensors["input_layernorm.weight"]
        self.post_layernorm = tensors["post_layernorm.weight"]
        self.linears = nn.ModuleDict(
            {
                name.replace(".", "_"): QuantizableLinear(
                    tensors[f"{name}.weight"],
                    tensors.get(f"{name}.bias"),
                    number_format=formats[name],
                    scales=formats[name].read_scales(tensors.__getitem__, name),
                    output_dtype=torch.float32 if all_reduce and name in _ROW_PARALLEL else None,
                )
                for name in DECODER_LINEARS
            }
        )
        rows = tensors["attention.qkv.weight"].shape[0]
        self.query_size = tensors["attention.dense.weight"].shape[1]
        self.key_value_size = (rows - self.query_size) // 2

    def linear(self, name: str) -> QuantizableLinear:
        """One of `DECODER_LINEARS`."""
        linear = self.linears[name.replace(".", "_")]
        assert isinstance(linear, QuantizableLinear)
        return linear

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
        index: int = 0,
    ) -> torch.Tensor:
        """hidden: [T, hidden_size] in `dtype`; cos, sin: `rope_tables` of the rows' positions.
        index: the layer's in the model, for `attention`."""
        normed = rms_norm(hidden, self.input_layernorm, self.eps)
        qkv = self.linear("attention.qkv")(normed)  # [T, (heads + 2 kv_heads) head_dim]
        sizes = (self.query_size, self.key_value_size, self.key_value_size)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.split(sizes, dim=-1))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attended = attention.forward(index, q, k, v).flatten(1)  # [T, heads head_dim]
        hidden = hidden + self._row_parallel("attention.dense", attended)
        normed = rms_norm(hidden, self.post_layernorm, self.eps)
        # TensorRT-LLM's names: `fc` is the activated half (gate_proj), `gate` is up_proj.
        activated = nn.functional.silu(self.linear("mlp.fc")(normed).to(torch.float32))
        product = activated * self.linear("mlp.gate")(normed).to(torch.float32)
        return hidden + self._row_parallel("mlp.proj", product.to(hidden.dtype))

    def _row_parallel(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(name)(x)
        return y if self.all_reduce is None else self.all_reduce(y).to(x.dtype)


def embed(
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    prompt_table: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the embedding [vocab_size, H], and of the prompt table for ids >= vocab_size.

    token_ids: [T] int64; prompt_table: [num_virtual_tokens, H]; returns [T, H] in
    `dtype`. The rule is TensorRT-LLM's: row = id - vocab_size.
    """
    if prompt_table is None or len(prompt_table) == 0:
        return embedding[token_ids].to(dtype)
    vocab_size = embedding.shape[0]
    is_virtual = token_ids >= vocab_size
    words = embedding[token_ids.masked_fill(is_virtual, 0)].to(dtype)
    virtual = prompt_table[(token_ids - vocab_size).clamp(min=0)].to(dtype)
    return torch.where(is_virtual[:, None], virtual, words)  # a mask as index would wait for a GPU
