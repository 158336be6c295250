"""How an engine will hold keys and values: what was asked for, of what its checkpoint can give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.kv_cache import AS_STORED, EngineKVCache
from nvlm.formats.tensor_names import ENGINE_LAYER
from nvlm.model.number_formats import FP8
from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import read_json_object

KVCacheDtype = Literal["auto", "fp8", "bfloat16"]
KVCacheScales = Literal["one", "own"]


def choose_kv_cache(
    dtype: KVCacheDtype, scales: KVCacheScales, config: CheckpointConfig, checkpoint_dir: Path
) -> EngineKVCache:
    """Raises `UserError` for what the checkpoint has not."""
    is_fp8 = config.stored_kv_format is FP8
    if dtype == "fp8" and not is_fp8:
        raise UserError(
            f"--kv_cache_dtype fp8 needs KV scales, and {checkpoint_dir} was converted with "
            "--kv_cache_quant_algo none; convert with --kv_cache_quant_algo FP8, or leave it out"
        )
    if dtype == "bfloat16" and config.dtype != "bfloat16":
        raise UserError(
            f"--kv_cache_dtype bfloat16 needs a checkpoint in bfloat16, and {checkpoint_dir} is in "
            f"{config.dtype}; convert with --kv_cache_quant_algo none for a cache in {config.dtype}"
        )
    in_dtype = not is_fp8 or dtype == "bfloat16"
    if scales == "own":
        if in_dtype:
            raise UserError(
                f"--kv_cache_scales own needs an FP8 KV cache, and this engine's is in "
                f"{config.dtype}; leave it out"
            )
        return EngineKVCache(scales=_own_scales(config, checkpoint_dir))
    return EngineKVCache(in_dtype=True) if in_dtype and is_fp8 else AS_STORED


def _own_scales(config: CheckpointConfig, checkpoint_dir: Path) -> tuple[tuple[float, float], ...]:
    """Scales of every layer's K and V, by the amax that calibration saw. Q's counts for nothing:
    decoder torch does not quantise it."""
    path = checkpoint_dir / layout.REPORT
    try:
        amax = dict(_amax_of_layers(read_json_object(path)))
        layers = [ENGINE_LAYER.format(i=i)[:-1] for i in range(config.decoder.num_hidden_layers)]
        pairs = [amax[layer] for layer in layers]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has no amax of K and V of every layer ({shown(error)}), which "
            "--kv_cache_scales own needs; convert again, or leave it out"
        ) from None
    return tuple((FP8.scale_from_amax(k), FP8.scale_from_amax(v)) for k, v in pairs)


def _amax_of_layers(report: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Raises `KeyError`, `TypeError` or `ValueError` for rows that no conversion wrote."""
    for row in report["attention"]:
        amax = float(row["k_amax"]), float(row["v_amax"])
        if not all(each >= 0 and math.isfinite(each) for each in amax):
            raise ValueError(f"amax of {row['layer']} is {amax}")
        yield str(row["layer"]).removesuffix(".attention"), amax
