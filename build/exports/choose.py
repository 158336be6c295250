"""From the command line's choices to an output format, refusing what a format cannot hold."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from build.conversion.convert import ConvertOptions
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import SCHEMES
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.tensor_names import ENGINE_LAYER
from nvlm.model.config import PROJECTOR_NORM_EPS, NVLMConfig
from nvlm.model.decoder import SHARED_SCALE_LINEARS
from nvlm.model.number_formats import format_named
from nvlm.program.errors import UserError

log = logging.getLogger(__name__)

TRTLLM = "trtllm"
OUTPUT_FORMATS = (TRTLLM, *SCHEMES)
_EXPORTS = " or ".join(SCHEMES)
_OF_A_CHECKPOINT = (
    "checkpoint_dir",
    "output_dir",
    "output_format",
    "text_only",
    "vision_quant_algo",
    "device",
)
"""Flags that mean something where --checkpoint_dir is exported; the rest was chosen before."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What --output_format, --text_only and --vision_quant_algo say."""

    output_format: str  # a scheme's name, or trtllm
    is_text_only: bool  # the export holds the decoder alone
    vision_quant_algo: str | None  # "FP8"; None: the ViT's linears stay in dtype

    @property
    def is_export(self) -> bool:
        return self.output_format != TRTLLM

    def check(self) -> None:
        """Raises `UserError` where the three do not go together."""
        if not self.is_export:
            if self.is_text_only:
                raise UserError(
                    f"--text_only needs --output_format {_EXPORTS}: a checkpoint of "
                    "TensorRT-LLM's format always has vision; leave it out"
                )
            if self.vision_quant_algo is not None:
                raise UserError(
                    f"--vision_quant_algo needs --output_format {_EXPORTS}; for a checkpoint "
                    "choose with build_engine.py --vision_precision FP8 instead"
                )
            return
        if self.vision_quant_algo is None:
            return
        if self.is_text_only:
            raise UserError(
                f"--vision_quant_algo {self.vision_quant_algo} quantises vision, which "
                "--text_only leaves out; give one of them"
            )
        if not SCHEMES[self.output_format].holds_vision:
            holders = [name for name, scheme in SCHEMES.items() if scheme.holds_vision]
            raise UserError(
                f"--output_format {self.output_format} holds vision in --dtype alone, found "
                f"--vision_quant_algo {self.vision_quant_algo}; leave it out, or use "
                f"--output_format {' or '.join(holders)}"
            )

    def check_model(self, options: ConvertOptions, model: NVLMConfig) -> None:
        """Raises `UserError` where the model's linears cannot be stored as chosen."""
        config = options.config(model)
        if self.is_export:
            _check_fused(config)

    def check_conversion(self, options: ConvertOptions, projector_norm_eps: float | None) -> None:
        """Raises `UserError` for choices of a conversion that an export cannot hold."""
        if not self.is_export:
            return
        if options.quant_algo is None:
            raise UserError(
                f"--output_format {self.output_format} holds FP8 linears, found --quant_algo "
                "none; use --quant_algo FP8, or the published folder as it is"
            )
        if options.tp_size * options.pp_size > 1:
            raise UserError(
                f"--output_format {self.output_format} holds the model whole, found --tp_size "
                f"{options.tp_size} --pp_size {options.pp_size}; leave them out: its readers "
                "divide it themselves"
            )
        if projector_norm_eps not in (None, PROJECTOR_NORM_EPS) and not self.is_text_only:
            raise UserError(
                f"--output_format {self.output_format} has no place for --projector_norm_eps "
                f"{projector_norm_eps}, expected {PROJECTOR_NORM_EPS}, which its readers run; "
                "leave it out"
            )

    def made(self, published: Path | None) -> HuggingFaceFormat:
        """published: the model's folder, if it is in Hugging Face's layout."""
        return HuggingFaceFormat(
            SCHEMES[self.output_format],
            published,
            self.is_text_only,
            format_named(self.vision_quant_algo),
        )


def _check_fused(config: CheckpointConfig) -> None:
    """Raises `UserError` where one of gate and up is excluded, which readers of exports fuse."""
    for i in range(config.decoder.num_hidden_layers):
        formats = {config.linear_format(i, linear) for linear in SHARED_SCALE_LINEARS}
        if len(formats) > 1:
            both = " and ".join(ENGINE_LAYER.format(i=i) + name for name in SHARED_SCALE_LINEARS)
            raise UserError(
                f"--exclude_modules names one of {both}, which readers of an export fuse; name "
                "both or neither"
            )


def check_checkpoint(choice: Choice, given: Collection[str], is_dry_run: bool) -> None:
    """Raises `UserError` for flags beside --checkpoint_dir that would do nothing."""
    if is_dry_run:
        raise UserError(
            "--dry_run plans a conversion of --model_dir, found --checkpoint_dir, whose export "
            "takes about the checkpoint's own size; leave --dry_run out"
        )
    if not choice.is_export:
        raise UserError(
            "--checkpoint_dir is of TensorRT-LLM's format already, found --output_format "
            f"{TRTLLM}; give --output_format {_EXPORTS}"
        )
    others = [name for name in given if name not in _OF_A_CHECKPOINT]
    if "model_dir" in others:
        raise UserError("found --model_dir and --checkpoint_dir, expected one input; give one")
    if others:
        raise UserError(
            f"--{others[0]} was chosen when --checkpoint_dir was converted; leave it out, or "
            "convert --model_dir with it"
        )


def warn_of_projector(projector_norm_eps: float, is_text_only: bool) -> None:
    """An export has no place for another epsilon than the one that its readers run."""
    if projector_norm_eps != PROJECTOR_NORM_EPS and not is_text_only:
        log.warning(
            "the checkpoint's projector has norm epsilon %g, and readers of the export run %g",
            projector_norm_eps,
            PROJECTOR_NORM_EPS,
        )
