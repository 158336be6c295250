"""What type the scales of a directory's linears are numbers of, and what follows where it is older.

The stored scales say it: a manifest may be of a version that did not round them.
"""

from __future__ import annotations

from pathlib import Path

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors, open_checked
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import ACTIVATION_SCALE, WEIGHT_SCALE

SCALE_DTYPE = "scale_dtype"


def scale_dtype(rank_files: Path, config: CheckpointConfig, recorded: object = None) -> str | None:
    """The checkpoint's dtype where all scales of rank 0's linears are numbers of it, else
    "float32"; None where the linears have no scales.

    rank_files: the folder of the ranks' weights. recorded: what a manifest says, for an engine of
    TensorRT-LLM, whose own files hold the weights. Raises `UserError` for a file of another shape.
    """
    if not config.weight_format.scale_shapes:
        return None
    if not (rank_files / layout.rank_file(0)).exists():
        return str(recorded or "float32")  # older versions recorded nothing
    dtype, tensors = TORCH_DTYPES[config.dtype], decoder_tensors(config, 0)
    source = open_checked(rank_files / layout.rank_file(0), tensors)
    for name in tensors:
        if name.endswith((WEIGHT_SCALE, ACTIVATION_SCALE)):
            scale = source.read(name)
            if (scale.to(dtype).to(scale.dtype) != scale).any():
                return "float32"
    return config.dtype


def what_differs(directory: Path, found: str | None, config: CheckpointConfig) -> str | None:
    """What TensorRT-LLM makes of scales that are not numbers of the checkpoint's dtype, in a
    sentence; None where all are. found: the `scale_dtype` of a checkpoint's or engine's
    directory."""
    if found in (None, config.dtype):
        return None
    return (
        f"{directory} has float32 scales, of an older version: TensorRT-LLM casts them to "
        f"{config.dtype}, so its logits differ from those of decoder 'torch'; convert again with "
        "convert_checkpoint.py --overwrite, then build again"
    )
