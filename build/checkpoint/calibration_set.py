"""Calibration samples: questions with images, as the runtime would see them.

The built-in set (photographs, documents and text-only questions in the folder
`calibration_data/`) is the default; `--calib_data` names another JSONL file of
`{"prompt": ..., "images": [paths relative to the file]}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nvlm.config import NVLMConfig
from nvlm.errors import UserError
from nvlm.inputs.images import load_image
from nvlm.inputs.prompt import Prompt, build_prompt, images_first
from nvlm.inputs.tiling import normalize, tile_image
from nvlm.inputs.tokenizer import Tokenizer

BUILT_IN = Path(__file__).parent / "calibration_data" / "calibration.jsonl"


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """tiles: [num_tiles, 3, S, S] float32, all images of the prompt in order (may be empty)."""

    prompt: Prompt
    tiles: torch.Tensor


def load_calibration_set(
    path: Path, num_samples: int, config: NVLMConfig, tokenizer: Tokenizer
) -> list[CalibrationSample]:
    """The first `num_samples` samples of a JSONL file. Raises `UserError` naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calib_data {path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--calib_data {path} has no samples")
    return [
        _load_sample(path, number, line, config, tokenizer)
        for number, line in numbered[:num_samples]
    ]


def _load_sample(
    path: Path, number: int, line: str, config: NVLMConfig, tokenizer: Tokenizer
) -> CalibrationSample:
    try:
        values = json.loads(line)
        question, names = values["prompt"], values.get("images", [])
        if not isinstance(question, str) or not all(isinstance(name, str) for name in names):
            raise TypeError("prompt must be a string and images a list of paths")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--calib_data {path} line {number} is not a sample: {error!r}") from None
    size = config.vision.image_size
    tiled = [
        tile_image(load_image(path.parent / name), size, config.tiling.max_num_tiles)
        for name in names
    ]
    prompt = build_prompt(
        images_first([image.num_tiles for image in tiled], question),
        tokenizer,
        tokens_per_tile=config.vision.tokens_per_tile,
        vocab_size=config.decoder.vocab_size,
    )
    if len(prompt.token_ids) > config.decoder.max_position_embeddings:
        raise UserError(
            f"--calib_data {path} line {number} has {len(prompt.token_ids)} tokens, the model "
            f"takes {config.decoder.max_position_embeddings}; shorten it"
        )
    tiles = [normalize(image.tiles) for image in tiled] or [torch.empty(0, 3, size, size)]
    return CalibrationSample(prompt, torch.cat(tiles))
