"""The fast path's own code on tensor parallel ranks, which are threads here: the logits of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from build.conversion.convert import ConvertOptions
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import CollectiveAllReduceNorm
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.models.torch_weights import open_weights
from runtime.engine.engine_dir import EngineDir
from tests.conftest import FP8, Workshop
from tests.support.ranks import engine_of
from tests.support.tolerances import FP8_FLIPPED, relative_error

CPU = torch.device("cpu")
NUM_BLOCKS, MAX_SEQ_LEN = 8, 128
PROMPT = SequenceStep([7 * i % 500 for i in range(40)], 0, [3, 0], None, 1)
TOKENS = [SequenceStep([5 * i], 40 + i, [3, 0], None, 1) for i in range(3)]


class Adding:
    """all_reduce of threads."""

    def __init__(self, num_ranks: int) -> None:
        self._parts: list[torch.Tensor | None] = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=60)

    def of_rank(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float32
            self._parts[rank] = x
            self._barrier.wait()
            total = sum(part for part in self._parts if part is not None)
            self._barrier.wait()
            assert isinstance(total, torch.Tensor)
            return total

        return add


def logits(workshop: Workshop, num_ranks: int, options: ConvertOptions) -> list[torch.Tensor]:
    """Logits of a prompt and three decode steps."""
    engine = EngineDir.read(engine_of(workshop, num_ranks, options))
    config, adding = engine.checkpoint_config, Adding(num_ranks)

    def run(rank: int) -> list[torch.Tensor]:
        source = open_weights(engine.directory / "llm", config, rank)
        weights = load_hopper_weights(source, config, CPU)
        forms = PlainForms()
        sums = CollectiveAllReduceNorm(forms, adding.of_rank(rank)) if num_ranks > 1 else None
        size = (5, MAX_SEQ_LEN, weights, NUM_BLOCKS, CPU, forms)
        model = HopperModel(config, *size, all_reduce_norm=sums)
        with torch.inference_mode():
            return [model.forward([step]).clone() for step in (PROMPT, *TOKENS)]

    with ThreadPoolExecutor(num_ranks) as pool:
        ranks = list(pool.map(run, range(num_ranks)))
    return [torch.cat(parts, dim=1) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("quantize_lm_head", [False, True], ids=["head in dtype", "head in FP8"])
def test_two_ranks_give_the_logits_of_one(workshop: Workshop, quantize_lm_head: bool) -> None:
    options = replace(FP8, quantize_lm_head=True) if quantize_lm_head else FP8
    pairs = zip(*(logits(workshop, size, options) for size in (2, 1)), strict=True)
    for found, expected in pairs:
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= FP8_FLIPPED
        assert torch.equal(found.argmax(1), expected.argmax(1))
