"""GET /v1/models and /v1/models/{model}: what the model is called, and how much it takes."""

from __future__ import annotations

from typing import Any

from frontends.openai.door import Door


def model_list(door: Door) -> dict[str, Any]:
    return {"object": "list", "data": [_entry(door, name) for name in door.options.models]}


def model_entry(door: Door, name: str) -> dict[str, Any]:
    """Raises `ApiError` for a name that is not served."""
    return _entry(door, door.require_model(name))


def _entry(door: Door, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": door.created,
        "owned_by": "nvlm-engine",
        "root": door.options.models[0],
        "parent": None,
        "max_model_len": door.max_model_len,
        "max_num_images": door.runner.engine.limits.max_num_images,
        "max_num_tiles": door.runner.engine.tiling.max_num_tiles,
    }
