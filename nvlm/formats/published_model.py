"""How a model directory looks before conversion: to say so where another kind was expected."""

from __future__ import annotations

from pathlib import Path

_HUGGING_FACE = ("model.safetensors.index.json", "model*.safetensors")
_MEGATRON = ("latest_checkpointed_iteration.txt", "mp_rank_*/", "*/mp_rank_*/")


def looks_like_model(directory: Path) -> bool:
    """Whether it holds weights as published, in either layout, whole or not."""
    patterns = (*_MEGATRON, *(_HUGGING_FACE if (directory / "config.json").is_file() else ()))
    return any(any(directory.glob(pattern)) for pattern in patterns)
