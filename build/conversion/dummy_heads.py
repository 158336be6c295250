"""The zero heads that the published ViT carries so that its 25 heads divide by 8 ranks.

They are verified to be zero in every layer, then left out; if one is not zero, all are kept and
the converter says so. Either way the result computes the same numbers.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from build.sources.source import WeightSource
from nvlm.formats.tensor_names import VISION_LAYER
from nvlm.model.config import VisionConfig

log = logging.getLogger(__name__)

_TENSORS = ("attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")


def converted_vision_config(source: WeightSource) -> VisionConfig:
    """The vision config after conversion: without dummy heads if all of them are zero."""
    vision = source.config.vision
    if vision.num_dummy_heads == 0:
        return vision
    for i in range(vision.num_hidden_layers):
        for kind in _TENSORS:
            name = VISION_LAYER.format(i=i) + kind
            if torch.any(_dummy_part(kind, source.read(name), vision)):
                log.warning(
                    "%s is not zero in its last %d heads; keeping all %d heads",
                    *(name, vision.num_dummy_heads, vision.num_stored_heads),
                )
                return vision
    return replace(vision, num_dummy_heads=0)


def without_dummy_heads(name: str, tensor: torch.Tensor, vision: VisionConfig) -> torch.Tensor:
    """The real heads' part of a tensor of the ViT (other tensors unchanged)."""
    real = vision.hidden_size
    if name.endswith("attn.qkv.weight"):
        return tensor.view(3, -1, real)[:, :real].reshape(3 * real, real)
    if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight")):
        return tensor[:real]
    if name.endswith("attn.proj.weight"):
        return tensor[:, :real]
    return tensor


def with_dummy_heads(name: str, tensor: torch.Tensor, stored: VisionConfig) -> torch.Tensor:
    """The other way: with zeros for the dummy heads of `stored`. Other tensors, and those that
    have their dummy heads, are unchanged."""
    num_missing = stored.attention_size - stored.hidden_size
    if name.endswith("attn.qkv.weight"):
        parts = tensor.view(3, -1, stored.hidden_size)
        if parts.shape[1] == stored.attention_size:
            return tensor
        zeros = parts.new_zeros(3, num_missing, stored.hidden_size)
        return torch.cat((parts, zeros), dim=1).flatten(0, 1)
    if not name.endswith(_TENSORS) or tensor.shape[-1] == stored.attention_size:
        return tensor
    zeros = tensor.new_zeros(*tensor.shape[:-1], num_missing)
    return torch.cat((tensor, zeros), dim=-1)


def _dummy_part(kind: str, tensor: torch.Tensor, vision: VisionConfig) -> torch.Tensor:
    real = vision.hidden_size  # channels of the real heads, which come first
    if kind == "attn.qkv.weight":
        return tensor.view(3, -1, real)[:, real:]
    return tensor[:, real:] if kind == "attn.proj.weight" else tensor[real:]
