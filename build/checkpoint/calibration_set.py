"""Calibration samples: questions with images, as the runtime would see them.

The built-in set (photographs, documents and text-only questions in the folder
`calibration_data/`) is the default; `--calib_data` names another JSONL file of
`{"prompt": ..., "images": [paths relative to the file]}`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvlm.config import NVLMConfig
from nvlm.errors import UserError
from nvlm.inputs.images import load_image
from nvlm.inputs.prompt import Prompt, build_prompt, images_first
from nvlm.inputs.tiling import tile_image
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.jsonl import read_jsonl_lines

_EXPECTED = 'expected {"prompt": "...", "images": ["path", ...]} on each line'

BUILT_IN = Path(__file__).parent / "calibration_data" / "calibration.jsonl"


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """tiles: [num_tiles, S, S, 3] uint8, all images of the prompt in order (may be none)."""

    prompt: Prompt
    tiles: NDArray[np.uint8]


def digest(samples: list[CalibrationSample]) -> str:
    """SHA-256 over everything the samples feed into the model."""
    result = hashlib.sha256()
    for sample in samples:
        result.update(json.dumps(sample.prompt.token_ids).encode())
        result.update(sample.tiles.tobytes())
    return result.hexdigest()


def load_calibration_set(
    path: Path, num_samples: int, config: NVLMConfig, tokenizer: Tokenizer
) -> list[CalibrationSample]:
    """The first `num_samples` samples of a JSONL file. Raises `UserError` naming file and line."""
    numbered = read_jsonl_lines(path, "--calib_data")
    if not numbered:
        raise UserError(f"--calib_data {path} has no samples; {_EXPECTED}")
    samples = []
    for number, line in numbered[:num_samples]:
        try:
            samples.append(_load_sample(path.parent, line, config, tokenizer))
        except UserError as error:
            raise UserError(f"--calib_data {path} line {number}: {error}") from None
    return samples


def _load_sample(
    folder: Path, line: str, config: NVLMConfig, tokenizer: Tokenizer
) -> CalibrationSample:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); {_EXPECTED}") from None
    if not isinstance(values, dict):
        raise UserError(f"a JSON {type(values).__name__}; {_EXPECTED}")
    question, names = values.get("prompt"), values.get("images", [])
    if not isinstance(question, str):
        raise UserError(f"prompt is {question!r}; {_EXPECTED}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"images is {names!r}, not a list of paths; {_EXPECTED}")
    size = config.vision.image_size
    tiled = [
        tile_image(load_image(folder / name), size, config.tiling.max_num_tiles) for name in names
    ]
    prompt = build_prompt(
        images_first([image.num_tiles for image in tiled], question),
        tokenizer,
        tokens_per_tile=config.vision.tokens_per_tile,
        vocab_size=config.decoder.vocab_size,
    )
    if len(prompt.token_ids) > config.decoder.max_position_embeddings:
        raise UserError(
            f"{len(prompt.token_ids)} tokens, the model takes "
            f"{config.decoder.max_position_embeddings}; shorten it"
        )
    no_tiles = np.empty((0, size, size, 3), np.uint8)
    return CalibrationSample(prompt, np.concatenate([no_tiles, *(i.tiles for i in tiled)]))
