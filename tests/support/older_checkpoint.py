"""Checkpoints as versions before decision 100 wrote them: the scales of linears in float32."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

from build.conversion.convert import ConvertOptions, convert
from build.sources.hugging_face import HuggingFaceSource
from nvlm.model.number_formats import number_format
from tests.support.damage import edit_json, sealed_again


def write_older_checkpoint(model_dir: Path, directory: Path, options: ConvertOptions) -> Path:
    """Converts without rounding scales, and takes out what says of which type they are."""
    with patch.object(number_format, "round_up", lambda scale, _dtype: scale):
        convert(HuggingFaceSource(model_dir), directory, options, torch.device("cpu"))
    edit_json(directory / "quantization_report.json", "scale_dtype", ...)
    edit_json(directory / "quantization_report.json", "scale", "amax / 448")
    edit_json(directory / "manifest.json", "arguments.scale_dtype", ...)
    sealed_again(directory)
    return directory
