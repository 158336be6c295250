"""The vision encoder's fast path: fused kernels, FlashAttention, FP8 or 16-bit tensor cores, and
one CUDA graph for each number of tiles."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from nvlm.linear import QuantizableLinear
from nvlm.vision_model import VisionLayer, VisionModel
from runtime.vision.kernels.forms import Forms


class HopperVisionModel:
    """tiles [num_tiles, 3, S, S] -> image embeddings, as `VisionModel`, over that module's weights.

    forms: the kernels, or their plain torch twins on any device.
    """

    def __init__(self, model: VisionModel, forms: Forms) -> None:
        self._model, self._forms = model, forms
        self._layers = [
            layer for layer in model.vision_model.encoder.layers if isinstance(layer, VisionLayer)
        ]
        self._scales = {
            module: module.scales.prod()
            for module in model.modules()
            if isinstance(module, QuantizableLinear)
        }

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        hidden = self._model.vision_model.embeddings(tiles)  # [n, positions, hidden_size]
        normed = self._norm(hidden, None, None, self._layers[0])[1]
        for layer, following in itertools.zip_longest(self._layers, self._layers[1:]):
            attended = self._attend(layer, normed)
            hidden, normed = self._forms.add_rms_norm(
                hidden,
                attended,
                layer.ls1,
                layer.norm2.weight,
                layer.norm2.eps,
                _activation_scale(layer.mlp.fc1),
            )
            activated = self._forms.gelu(
                self._linear(layer.mlp.fc1, normed), _activation_scale(layer.mlp.fc2)
            )
            delta = self._linear(layer.mlp.fc2, activated)
            if following is not None:
                hidden, normed = self._norm(hidden, delta, layer.ls2, following)
        return self._model.project(hidden + delta * layer.ls2)

    def _norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        layer_scale: torch.Tensor | None,
        layer: VisionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream and what `layer` begins with."""
        norm, scale = layer.norm1, _activation_scale(layer.attn.qkv)
        return self._forms.add_rms_norm(hidden, delta, layer_scale, norm.weight, norm.eps, scale)

    def _attend(self, layer: VisionLayer, normed: torch.Tensor) -> torch.Tensor:
        attention = layer.attn
        q_norm, k_norm = attention.q_norm, attention.k_norm
        qkv = self._forms.normalize_qk(
            self._linear(attention.qkv, normed),
            q_norm.weight,
            k_norm.weight,
            q_norm.eps,
            q_norm.num_real_channels,
        )
        heads = qkv.unflatten(-1, (3, -1, attention.head_dim))  # [n, positions, 3, heads, d]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [n, heads, positions, d]
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        rows = attended.transpose(1, 2).flatten(2)
        scale = _activation_scale(attention.proj)
        if scale is not None:
            rows = self._forms.quantize(rows, scale)
        return self._linear(attention.proj, rows)

    def _linear(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not (isinstance(module, QuantizableLinear) and module.is_fp8):
            return module(x)
        y = self._forms.fp8_linear(
            x.flatten(0, -2), module.weight, self._scales[module], module.bias, self._model_dtype
        )
        return y.unflatten(0, x.shape[:-1])

    @property
    def _model_dtype(self) -> torch.dtype:
        return self._layers[0].ls1.dtype


def _activation_scale(module: nn.Module) -> torch.Tensor | None:
    """Of a linear that takes e4m3."""
    is_fp8 = isinstance(module, QuantizableLinear) and module.is_fp8
    return module.scales[1] if is_fp8 else None  # type: ignore[index]
