"""The vision encoder's fast path: fused kernels, FlashAttention, FP8 or 16-bit tensor cores."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import cast

import torch
from torch import nn

from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import FP8
from nvlm.model.vision import VisionLayer, VisionModel
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.vision.kernels.operands import ScaledDelta
from runtime.vision.kernels.plain_forms import PlainForms

_GRANULARITY = 16
"""Tensor cores want rows of a multiple of so many numbers."""


class HopperVisionModel:
    """tiles [num_tiles, S, S, 3] uint8 -> image embeddings, as `VisionModel` gives them for the
    normalised tiles, over that module's weights.

    forms: the kernels, or their plain torch twins on any device.
    """

    def __init__(self, model: VisionModel, forms: PlainForms) -> None:
        self._model, self._forms = model, forms
        self._layers = [
            layer for layer in model.vision_model.encoder.layers if isinstance(layer, VisionLayer)
        ]
        self._fp8_linears: dict[nn.Module, Fp8Linear] = {
            module: _fp8_linear(module)
            for module in model.modules()
            if isinstance(module, QuantizableLinear) and module.number_format is FP8
        }
        kernel = model.vision_model.embeddings.patch_embedding.weight.flatten(1)
        self._kernel = nn.functional.pad(kernel, (0, -kernel.shape[1] % _GRANULARITY))

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        (embeddings,) = self.in_slices(tiles, ())
        return embeddings

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def in_slices(self, tiles: torch.Tensor, ends: Container[int]) -> Iterator[torch.Tensor]:
        """Encodes slice by slice, each of which can be a CUDA graph. A slice ends after as many
        layers as are in `ends`, from 1 to num_layers - 1; the last one ends with the projector.

        Yields the residual stream [num_tiles, positions, hidden_size] after each slice but the
        last, then the image embeddings. Holds what the next slice reads until it has run.
        """
        hidden = self._embed(tiles)
        normed = self._norm(hidden, None, self._layers[0])[1]
        last = len(self._layers) - 1
        for index in range(last):
            hidden, normed = self._run(index, hidden, normed)
            if index + 1 in ends:
                yield hidden
        hidden, added = self._add(self._layers[last], hidden, normed)
        norm = self._model.mlp1[0]
        assert isinstance(norm, nn.LayerNorm)
        merged = self._forms.add_merge_norm(hidden, added, norm, self._model.patches_per_side)
        yield cast(torch.Tensor, self._model.mlp1[1:](merged))

    def _embed(self, tiles: torch.Tensor) -> torch.Tensor:
        embeddings = self._model.vision_model.embeddings
        size = embeddings.patch_embedding.kernel_size[0]
        pixels = self._forms.cut_patches(tiles, size, self._kernel.shape[1], self._kernel.dtype)
        patches = nn.functional.linear(pixels, self._kernel, embeddings.patch_embedding.bias)
        return self._forms.embed(
            patches.unflatten(0, (len(tiles), -1)),
            embeddings.class_embedding,
            embeddings.position_embedding,
        )

    def _run(
        self, index: int, hidden: torch.Tensor, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after layer `index`, and what the next one begins with."""
        hidden, added = self._add(self._layers[index], hidden, normed)
        return self._norm(hidden, added, self._layers[index + 1])

    def _add(
        self, layer: VisionLayer, hidden: torch.Tensor, normed: torch.Tensor
    ) -> tuple[torch.Tensor, ScaledDelta]:
        """The residual stream after a layer's attention, and what its MLP adds."""
        mlp = layer.mlp
        hidden, normed = self._forms.add_rms_norm(
            hidden,
            ScaledDelta(self._attend(layer, normed), layer.ls1),  # freed before the MLP's rows
            layer.norm2,
            self._activation_scale(mlp.fc1),
        )
        activated = self._forms.gelu(self._linear(mlp.fc1, normed), self._activation_scale(mlp.fc2))
        return hidden, ScaledDelta(self._linear(mlp.fc2, activated), layer.ls2)

    def _norm(
        self,
        hidden: torch.Tensor,
        added: ScaledDelta | None,
        layer: VisionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream and what `layer` begins with."""
        scale = self._activation_scale(layer.attn.qkv)
        return self._forms.add_rms_norm(hidden, added, layer.norm1, scale)

    def _attend(self, layer: VisionLayer, normed: torch.Tensor) -> torch.Tensor:
        attention = layer.attn
        qkv = self._forms.normalize_qk(
            self._linear(attention.qkv, normed), attention.q_norm, attention.k_norm
        )
        heads = qkv.unflatten(-1, (3, -1, attention.head_dim))  # [n, positions, 3, heads, d]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [n, heads, positions, d]
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        rows = attended.transpose(1, 2).flatten(2)
        scale = self._activation_scale(attention.proj)
        if scale is not None:
            rows = self._forms.quantize(rows, scale)
        return self._linear(attention.proj, rows)

    def _linear(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        linear = self._fp8_linears.get(module)
        if linear is None:
            return module(x)
        y = self._forms.linear(x.flatten(0, -2), linear, self._model_dtype)
        return y.unflatten(0, x.shape[:-1])

    def _activation_scale(self, module: nn.Module) -> torch.Tensor | None:
        """What a linear that takes e4m3 has its input quantised with."""
        linear = self._fp8_linears.get(module)
        return None if linear is None else linear.activation_scale

    @property
    def _model_dtype(self) -> torch.dtype:
        return self._layers[0].ls1.dtype


def _fp8_linear(module: QuantizableLinear) -> Fp8Linear:
    assert module.scales is not None, "FP8 weights have scales"
    return Fp8Linear(module.weight, module.scales[1], module.scales.prod(), module.bias)
