"""The fast path's own code with the kernels' plain twins, on a CPU: the oracle's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.decoder.hopper_model import HopperModel, batch_sizes
from runtime.decoder.hopper_weights import load_hopper_weights
from runtime.decoder.kernels import plain_forms
from runtime.decoder.plain_model import PlainModel
from runtime.decoder.step import DecoderModel, SequenceStep
from runtime.decoder.torch_weights import load_weights, open_weights
from runtime.engine_dir import EngineDir
from tests.tolerances import KERNEL_LOGITS, relative_error

CPU = torch.device("cpu")
NUM_BLOCKS, MAX_SEQ_LEN = 24, 192


@pytest.fixture(scope="module")
def models(engine_dir: Path) -> tuple[DecoderModel, DecoderModel]:
    """The oracle and the fast path over one file."""
    engine = EngineDir.read(engine_dir)
    config = engine.checkpoint_config
    source = open_weights(engine_dir / "llm", config)
    oracle = PlainModel(config, load_weights(source, config, CPU), NUM_BLOCKS, CPU)
    weights = load_hopper_weights(source, config, CPU)
    fast = HopperModel(config, 5, MAX_SEQ_LEN, weights, NUM_BLOCKS, CPU, plain_forms)
    return oracle, fast


def prompt(first: int, count: int, blocks: list[int], *, is_last: bool = True) -> SequenceStep:
    return SequenceStep(
        [7 * i % 500 for i in range(first, first + count)], first, blocks, None, is_last
    )


def token(position: int, blocks: list[int]) -> SequenceStep:
    return SequenceStep([position % 500], position, blocks, None, True)


A, B, C, D = [3, 0, 9], [5, 1], [7], [2, 4, 6]
TABLE = torch.randn(20, 128, generator=torch.Generator().manual_seed(1))
PICTURE = SequenceStep([1, 2, *range(512, 532), 3], 0, D, TABLE, True)
SCENES = {
    "one prompt": [[prompt(0, 50, A)]],
    "several prompts": [[prompt(0, 50, A), prompt(0, 33, B), prompt(0, 1, C)]],
    "a picture": [[PICTURE], [token(23, D)]],
    "chunks": [[prompt(0, 40, A, is_last=False)], [prompt(40, 30, A)]],
    "decoding, one to three": [
        [prompt(0, 50, A), prompt(0, 31, B), prompt(0, 5, C)],
        [token(50, A)],
        [token(51, A), token(31, B)],
        [token(5, C), token(52, A), token(32, B)],
    ],
    "decoding beside prompts": [
        [prompt(0, 50, A), prompt(0, 64, B)],
        [prompt(0, 20, C, is_last=False), token(50, A), PICTURE],
        [token(51, A), prompt(20, 5, C), token(23, D)],
    ],
}


@pytest.mark.parametrize("name", SCENES)
def test_every_mixture_of_prompts_and_tokens_gives_the_oracles_logits(
    models: tuple[DecoderModel, DecoderModel], name: str
) -> None:
    for steps in SCENES[name]:
        expected, found = (model.forward(steps) for model in models)
        assert found.shape == expected.shape == (sum(s.wants_logits for s in steps), 512)
        assert len(found) == 0 or relative_error(found, expected) < KERNEL_LOGITS


def test_padding_rows_disturb_nobody(models: tuple[DecoderModel, DecoderModel]) -> None:
    """Five rows are run as eight."""
    blocks = [[block] for block in range(5)]
    for model in models:
        model.forward([prompt(0, 9, each) for each in blocks])
    steps = [token(9, each) for each in blocks]
    expected, found = (model.forward(steps) for model in models)
    assert relative_error(found, expected) < KERNEL_LOGITS


def test_warming_up_disturbs_nobody(models: tuple[DecoderModel, DecoderModel]) -> None:
    fast = models[1]
    assert isinstance(fast, HopperModel)
    for model in models:
        model.forward([prompt(0, 50, A)])
    for max_num_tokens in (40, 10 * MAX_SEQ_LEN):
        fast.warm_up(max_num_tokens)
    expected, found = (model.forward([token(50, A)]) for model in models)
    assert relative_error(found, expected) < KERNEL_LOGITS


@pytest.mark.parametrize(
    ("max_batch_size", "sizes"),
    [(1, [1]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16]), (1000, None)],
)
def test_batch_sizes_end_at_the_largest_batch(max_batch_size: int, sizes: list[int] | None) -> None:
    found = batch_sizes(max_batch_size)
    assert found == sorted(set(found))
    assert found == sizes if sizes else found[-1] == 256
