"""The scales of a layer's keys and values: the engine's own, or the checkpoint's one of both."""

from __future__ import annotations

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.safetensors_reader import TensorSource
from nvlm.formats.tensor_names import ENGINE_LAYER, KV_CACHE_SCALE

LayerScales = tuple[float, float]
"""A layer's scale of K and its scale of V."""


def read_scales(source: TensorSource, config: CheckpointConfig, layer: int) -> LayerScales | None:
    """None where keys and values are held as they are."""
    if not config.kv_cache_format.scale_shapes:
        return None
    if config.kv_cache.scales:
        return config.kv_cache.scales[layer]
    one = float(source.read(ENGINE_LAYER.format(i=layer) + KV_CACHE_SCALE))
    return one, one
