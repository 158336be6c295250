"""--exclude_modules and --quantize_lm_head: which linears of the decoder are quantised."""

from __future__ import annotations

from fnmatch import fnmatchcase

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.tensor_names import ENGINE_LAYER, HEAD
from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.number_formats import UNQUANTIZED
from nvlm.program.errors import UserError


def check_excluded(config: CheckpointConfig) -> None:
    """Raises `UserError` for a name that is no linear's, and where nothing is left to quantise."""
    patterns = config.exclude_modules
    if not patterns:
        return
    if config.weight_format is UNQUANTIZED:
        raise UserError(
            "--exclude_modules needs --quant_algo FP8, found none, which quantises no linear; "
            "leave it out"
        )
    layers = range(config.decoder.num_hidden_layers)
    names = [ENGINE_LAYER.format(i=i) + linear for i in layers for linear in DECODER_LINEARS]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"--exclude_modules {pattern} is no linear of this model, expected names or "
                f"patterns of {names[0]} to {names[-1]}; give one as quantization_report.json "
                "has it"
            )
    if all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names):
        raise UserError(
            "--exclude_modules names every linear, expected some to be left for FP8; use "
            "--quant_algo none"
        )


def check_head(config: CheckpointConfig) -> None:
    """Raises `UserError` where the head is to be quantised and something else says that it is
    not."""
    if not config.quantize_lm_head:
        return
    if config.weight_format is UNQUANTIZED:
        raise UserError(
            "--quantize_lm_head needs --quant_algo FP8, found none, which quantises no linear; "
            "leave it out"
        )
    for pattern in config.exclude_modules:
        if fnmatchcase(HEAD, pattern):
            raise UserError(
                f"--exclude_modules {pattern} names {HEAD}, which --quantize_lm_head quantises; "
                "leave one of them out"
            )
