"""Engines of one FP8 checkpoint whose KV cache is not as the checkpoint says."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Workshop

KV_CACHES: dict[str, dict[str, object]] = {
    "own scales": {"kv_cache_scales": "own"},
    "bfloat16": {"kv_cache_dtype": "bfloat16"},
}
"""Options of a build."""


def kv_cache_engine(workshop: Workshop, checkpoint_dir: Path, name: str) -> Path:
    """Builds the engine of a session's checkpoint, once."""
    engine = f"engine_{name.replace(' ', '_')}"
    return workshop.engine(
        engine, checkpoint_dir, vision="torch", max_num_images=3, **KV_CACHES[name]
    )
