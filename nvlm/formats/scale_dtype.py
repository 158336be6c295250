"""What type the scales of a directory's linears are numbers of, and what follows where it is older.

A manifest says it: a checkpoint's in its arguments, an engine's in its source. Versions that stored
float32 scales said nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.formats.checkpoint_config import CheckpointConfig

SCALE_DTYPE = "scale_dtype"


def scale_dtype(made_from: Mapping[str, Any], config: CheckpointConfig) -> str | None:
    """The type's name, or None where the decoder's linears have no scales."""
    if not config.weight_format.scale_shapes:
        return None
    return str(made_from.get(SCALE_DTYPE) or "float32")


def what_differs(
    directory: Path, made_from: Mapping[str, Any], config: CheckpointConfig
) -> str | None:
    """What TensorRT-LLM makes of scales that are not numbers of the checkpoint's dtype, in a
    sentence; None where all are."""
    if scale_dtype(made_from, config) in (None, config.dtype):
        return None
    return (
        f"{directory} has float32 scales, of an older version: TensorRT-LLM casts them to "
        f"{config.dtype}, so its logits differ by 1 to 3 % from decoder 'torch'; convert again "
        "with convert_checkpoint.py --overwrite, then build again"
    )
