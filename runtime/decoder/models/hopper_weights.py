"""A rank's tensors as the kernels of the fast path take them, on the device as they are stored.

Gate and up lie in one weight: their scales are one by the numerics contract. All tensors are asked
for at once and come while the rest is asked for. No GPU memory is needed beyond the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_layer_tensors, decoder_tensors
from nvlm.formats.safetensors_reader import TensorSource
from nvlm.formats.tensor_copies import copies_of
from nvlm.formats.tensor_names import ENGINE_LAYER, HEAD
from nvlm.model.decoder import SHARED_SCALE_LINEARS
from nvlm.model.number_formats import FP8
from runtime.decoder.kernels.operands import Norm
from runtime.decoder.models.kv_scales import LayerScales, read_scales
from runtime.kernels.fp8_linear import Fp8Linear


@dataclass(frozen=True, slots=True)
class HopperLayer:
    input_norm: Norm  # before attention
    qkv: Fp8Linear  # q, k and v of the rank's heads, stacked on dim 0
    dense: Fp8Linear  # attention's output
    post_norm: Norm  # before the MLP
    gate_up: Fp8Linear  # gate and up, stacked on dim 0
    down: Fp8Linear  # the MLP's output
    kv_scales: LayerScales | None  # None: the cache is not quantised


@dataclass(frozen=True, slots=True)
class HopperWeights:
    """The decoder's weights, laid out for the GPU."""

    embedding: torch.Tensor  # [vocab_size, hidden_size] in `dtype`
    layers: list[HopperLayer]  # in order
    final_norm: Norm  # before the head
    lm_head: torch.Tensor | Fp8Linear  # [the rank's rows, hidden_size] in `dtype`, or quantised


def load_hopper_weights(
    source: TensorSource, config: CheckpointConfig, device: torch.device
) -> HopperWeights:
    """Loads an FP8 checkpoint."""
    infos = decoder_layer_tensors(config) | decoder_tensors(config)
    eps = config.decoder.rms_norm_eps
    copies = copies_of(source, device)

    def linear(prefix: str, names: tuple[str, ...]) -> Fp8Linear:
        """`names` one after another in one weight, with one scale."""
        rows = [infos[f"{name}.weight"].shape[0] for name in names]
        columns = infos[f"{names[0]}.weight"].shape[1]
        dtype = infos[f"{names[0]}.weight"].dtype
        weight = torch.empty(sum(rows), columns, dtype=dtype, device=device)
        for name, part in zip(names, weight.split(rows), strict=True):
            copies.read_into(f"{prefix}{name}.weight", part)
        scales, *others = (FP8.read_scales(source.read, prefix + name) for name in names)
        assert scales is not None
        assert all(each == scales for each in others), f"{prefix}{names} share their scales"
        weight_scale, activation_scale = torch.tensor([scales.weight, scales.activation])
        bias = f"{names[0]}.bias"
        return Fp8Linear(
            weight,
            activation_scale.to(device),
            (activation_scale * weight_scale).to(device),
            copies.read(prefix + bias) if bias in infos else None,
        )

    def layer(i: int) -> HopperLayer:
        prefix = ENGINE_LAYER.format(i=i)
        return HopperLayer(
            Norm(copies.read(f"{prefix}input_layernorm.weight"), eps),
            linear(prefix, ("attention.qkv",)),
            linear(prefix, ("attention.dense",)),
            Norm(copies.read(f"{prefix}post_layernorm.weight"), eps),
            linear(prefix, SHARED_SCALE_LINEARS),
            linear(prefix, ("mlp.proj",)),
            read_scales(source, config, i),
        )

    num_layers = config.decoder.num_hidden_layers
    is_head_quantised = config.head_format is FP8
    with copies:
        return HopperWeights(
            embedding=copies.read("transformer.vocab_embedding.weight"),
            layers=[layer(i) for i in range(num_layers)],
            final_norm=Norm(copies.read("transformer.ln_f.weight"), eps),
            lm_head=linear("", (HEAD,)) if is_head_quantised else copies.read(f"{HEAD}.weight"),
        )
