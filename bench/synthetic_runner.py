"""A runner over random models: requests of an exact length in, text for every token out."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from nvlm.formats import layout
from nvlm.inputs.prompt import ImageSlot, build_prompt
from nvlm.inputs.tokenizer import IM_END, IM_START, TOKENIZER_FILE, Tokenizer
from runtime.decoder.executor import DecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.vision.executor import VisionExecutor

_TOKENIZER = Path(__file__).parents[1] / "models" / "nvlm-d-tiny" / TOKENIZER_FILE
NUM_TILES = 7
_GRID = (3, 2)  # and the thumbnail


def synthetic_runner(
    folder: Path, engine: EngineDir, vision: VisionExecutor, decoder: DecoderExecutor
) -> Runner:
    """Writes a tokenizer of the decoder's vocabulary below `folder`, which stays as long as the
    runner does."""
    write_tokenizer(folder / layout.TOKENIZER, engine.checkpoint_config.decoder.vocab_size)
    return Runner(replace(engine, directory=folder), vision, decoder)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes the small model's tokenizer for `vocab_size` ids, each of them with a text of its own.

    A server reports text. An id without one, or with a part of a character, would hide its token
    from the client's clock. So ASCII alone is kept, and <|im_start|> and <|im_end|>, which have
    none; all other ids read ~ID. A tokenizer must have every byte: those beyond ASCII get ids from
    `vocab_size` on, which no model draws.
    """
    tokenizer = Tokenizer(_TOKENIZER.parent)
    values = json.loads(_TOKENIZER.read_text())
    model = values["model"]
    values["added_tokens"] = [
        token for token in values["added_tokens"] if token["content"] in (IM_START, IM_END)
    ]
    vocab = {
        text: token_id
        for text, token_id in model["vocab"].items()
        if tokenizer.bytes_of(token_id).isascii()
    }
    model["merges"] = [(left, right) for left, right in model["merges"] if left + right in vocab]
    used = {*vocab.values(), *(token["id"] for token in values["added_tokens"])}
    vocab |= {f"~{token_id}": token_id for token_id in range(vocab_size) if token_id not in used}
    others = [text for text in model["vocab"] if len(text) == 1 and text not in vocab]
    model["vocab"] = vocab | dict(zip(others, count(vocab_size)))
    folder.mkdir(parents=True)
    (folder / TOKENIZER_FILE).write_text(json.dumps(values))


def text_request(
    runner: Runner, num_tokens: int, max_new_tokens: int, seed: int
) -> GenerationRequest:
    """A question without a picture, whose whole prompt has `num_tokens` tokens."""
    text = _question(runner, [], num_tokens, seed)
    return GenerationRequest.images_first(text, max_new_tokens=max_new_tokens)


def picture_request(
    runner: Runner, picture: Path, num_tokens: int, max_new_tokens: int, seed: int
) -> GenerationRequest:
    """A question about a picture of `NUM_TILES` tiles, whose whole prompt has `num_tokens`."""
    text = _question(runner, [ImageSlot(NUM_TILES), "\n"], num_tokens, seed)
    return GenerationRequest.images_first(text, (picture,), max_new_tokens=max_new_tokens)


def draw_pictures(folder: Path, number: int, tile_size: int, first_seed: int = 0) -> list[Path]:
    """JPEG files of `NUM_TILES` tiles, 1344 x 896 pixels where a tile has 448.

    Each shows different pixels, so that no request finds another's blocks in the KV cache, nor its
    picture encoded. first_seed: pictures before it show others.
    """
    folder.mkdir(parents=True)
    size = _GRID[0] * tile_size, _GRID[1] * tile_size
    paths = []
    for seed in range(first_seed, first_seed + number):
        colours = np.random.default_rng(seed).integers(256, size=(8, 12, 3), dtype=np.uint8)
        paths.append(folder / f"{seed}.jpg")
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def _question(runner: Runner, before: list[str | ImageSlot], num_tokens: int, seed: int) -> str:
    """Random digits, each a token, that fill the prompt up to `num_tokens`."""
    engine = runner.engine

    def length(text: str) -> int:
        prompt = build_prompt(
            [*before, text],
            runner.tokenizer,
            tokens_per_tile=engine.vision_config.tokens_per_tile,
            vocab_size=engine.checkpoint_config.decoder.vocab_size,
        )
        return len(prompt.token_ids)

    num_digits = num_tokens - length("")
    assert num_digits > 0, f"a prompt of {num_tokens} tokens has no room for a question"
    digits = np.random.default_rng((num_tokens, seed)).integers(10, size=num_digits)
    text = "".join(map(str, digits))
    assert length(text) == num_tokens, "the tokenizer gives every digit a token"
    return text
