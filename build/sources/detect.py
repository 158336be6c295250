"""Which layout a model directory has."""

from __future__ import annotations

from pathlib import Path

from build.sources.hugging_face import HuggingFaceSource, read_index
from build.sources.megatron.folder import is_megatron
from build.sources.megatron.source import MegatronSource
from build.sources.source import WeightSource
from nvlm.formats import layout
from nvlm.model.config import NVLMConfig
from nvlm.program.errors import UserError


def open_source(
    model_dir: Path,
    *,
    tokenizer_dir: Path | None = None,
    projector_norm_eps: float | None = None,
) -> WeightSource:
    """The weights in `model_dir`, in either published layout.

    `tokenizer_dir` is `model_dir` by default, `projector_norm_eps` what the layout's own software
    runs: 1e-5 for Hugging Face, 1e-6 for Megatron.
    """
    if not is_megatron(model_dir):
        return HuggingFaceSource(
            model_dir, tokenizer_dir=tokenizer_dir, projector_norm_eps=projector_norm_eps
        )
    if any(model_dir.glob(layout.ANY_WEIGHTS)):
        raise UserError(
            f"{model_dir} holds a Megatron checkpoint and safetensors files; give a folder with "
            "one of them as --model_dir"
        )
    return MegatronSource(
        model_dir, tokenizer_dir=tokenizer_dir, projector_norm_eps=projector_norm_eps
    )


def read_config(model_dir: Path, *, tokenizer_dir: Path | None = None) -> NVLMConfig:
    """The model's shapes for a plan. In Hugging Face's layout config.json and the index are enough,
    the weights need not be there yet; Megatron's shapes are in its rank files."""
    if is_megatron(model_dir):
        return open_source(model_dir, tokenizer_dir=tokenizer_dir).config
    return read_index(model_dir)
