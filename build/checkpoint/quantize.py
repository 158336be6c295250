"""A decoder layer's tensors as the checkpoint stores them: FP8 weights and their scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from build.checkpoint.report import AttentionReport, LinearReport
from nvlm import fp8
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.tensor_names import (
    ACTIVATION_SCALE,
    ENGINE_LINEARS,
    KV_CACHE_SCALE,
    SHARED_SCALE_LINEARS,
    WEIGHT_SCALE,
)


def quantize_layer(
    tensors: Mapping[str, torch.Tensor],
    config: CheckpointConfig,
    linears: Mapping[str, LinearReport],
    attention: AttentionReport,
) -> dict[str, torch.Tensor]:
    """`tensors` with linears replaced by FP8 and scales added, as `config` asks.

    Weights are in the checkpoint's dtype already: cast first, then quantised.
    """
    result = dict(tensors)
    if config.quant_algo == "FP8":
        for name in ENGINE_LINEARS:
            shared = SHARED_SCALE_LINEARS if name in SHARED_SCALE_LINEARS else (name,)
            weight_scale = fp8.scale_from_amax(max(linears[n].weight_amax for n in shared))
            input_scale = fp8.scale_from_amax(max(linears[n].input_amax for n in shared))
            result[f"{name}.weight"] = fp8.quantize(tensors[f"{name}.weight"], weight_scale)
            result[f"{name}.{WEIGHT_SCALE}"] = torch.tensor([weight_scale])
            result[f"{name}.{ACTIVATION_SCALE}"] = torch.tensor([input_scale])
    if config.kv_cache_quant_algo == "FP8":
        result[KV_CACHE_SCALE] = torch.tensor([fp8.scale_from_amax(attention.amax)])
    return result
