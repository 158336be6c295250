"""The fast path's own code with the kernels' plain twins, on a CPU: the oracle's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.planning.peer_memory import places, rows_of_a_rank
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models import hopper_attention
from runtime.decoder.models.hopper_model import HopperModel, batch_sizes
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import DecoderModel, SequenceStep
from runtime.decoder.models.step_graphs import StepGraphs, StepSize
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.engine.engine_dir import EngineDir
from tests.conftest import FP8, Workshop
from tests.support.kv_caches import KV_CACHES, kv_cache_engine
from tests.support.tolerances import KERNEL_LOGITS, relative_error

CPU = torch.device("cpu")
NUM_BLOCKS, MAX_BATCH_SIZE, MAX_SEQ_LEN = 24, 5, 320


class Watched:
    """The plain forms; `calls` are the names and tensors that they were given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[torch.Tensor]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        form = getattr(PlainForms(), name)

        def watched(*arguments: Any) -> Any:
            tensors = [x for each in arguments for x in _tensors(each)]
            self.calls.append((name, tensors))
            return form(*arguments)

        return watched


def _tensors(argument: object) -> list[torch.Tensor]:
    """An argument, or those that travel together in it."""
    if is_dataclass(argument):
        return [x for field in fields(argument) for x in _tensors(getattr(argument, field.name))]
    return [argument] if isinstance(argument, torch.Tensor) else []


FP8_HEAD = "FP8 head"


@pytest.fixture(scope="module", params=["as stored", *KV_CACHES, FP8_HEAD])
def models(
    request: pytest.FixtureRequest,
    workshop: Workshop,
    model_dir: Path,
    checkpoint_dir: Path,
    engine_dir: Path,
) -> tuple[DecoderModel, DecoderModel]:
    """The oracle and the fast path over one file, for every KV cache and for a head in FP8."""
    if request.param in KV_CACHES:
        engine_dir = kv_cache_engine(workshop, checkpoint_dir, request.param)
    if request.param == FP8_HEAD:
        options = replace(FP8, quantize_lm_head=True)
        checkpoint = workshop.checkpoint("head_checkpoint", model_dir, options)
        engine_dir = workshop.engine("head_engine", checkpoint, vision="torch", max_num_images=3)
    engine = EngineDir.read(engine_dir)
    config = engine.checkpoint_config
    source = open_weights(engine_dir / "llm", config)
    oracle = PlainModel(config, load_weights(source, config, CPU), NUM_BLOCKS, CPU)
    weights = load_hopper_weights(source, config, CPU)
    fast = HopperModel(config, MAX_BATCH_SIZE, MAX_SEQ_LEN, weights, NUM_BLOCKS, CPU, Watched())  # type: ignore[arg-type]
    fast.capture_graphs()
    return oracle, fast


def open_fast(
    engine_dir: Path, *, max_batch_size: int = MAX_BATCH_SIZE, max_seq_len: int = MAX_SEQ_LEN
) -> HopperModel:
    config = EngineDir.read(engine_dir).checkpoint_config
    weights = load_hopper_weights(open_weights(engine_dir / "llm", config), config, CPU)
    return HopperModel(config, max_batch_size, max_seq_len, weights, NUM_BLOCKS, CPU, PlainForms())


@pytest.fixture
def calls(models: tuple[DecoderModel, HopperModel]) -> list[tuple[str, list[torch.Tensor]]]:
    """Records the fast path's calls from now on."""
    forms: Any = models[1]._forms
    forms.calls.clear()
    return forms.calls  # type: ignore[no-any-return]


def prompt(first: int, count: int, blocks: list[int], *, is_last: bool = True) -> SequenceStep:
    return SequenceStep(
        [7 * i % 500 for i in range(first, first + count)], first, blocks, None, int(is_last)
    )


def token(position: int, blocks: list[int]) -> SequenceStep:
    return SequenceStep([position % 500], position, blocks, None, 1)


A, B, C, D = [3, 0, 9], [5, 1], [7], [2, 4, 6]
E, F, G = [8, *range(10, 18)], [18, 19, 20, 21, 22], [0, 2, 3, 4, 6, 9, 23]
TABLE = torch.randn(20, 128, generator=torch.Generator().manual_seed(1))
PICTURE = SequenceStep([1, 2, *range(512, 532), 3], 0, D, TABLE, 1)
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
    "chunks of several prompts": [
        [prompt(0, 70, A, is_last=False), prompt(0, 33, E), prompt(0, 60, F, is_last=False)],
        [prompt(60, 40, F), token(33, E), prompt(70, 25, A)],
        [token(100, F), token(34, E), token(95, A)],
    ],
    "a picture that a chunk ends in, and its last token": [
        [replace(PICTURE, token_ids=PICTURE.token_ids[:12], num_logits=0), prompt(0, 9, C)],
        [replace(PICTURE, token_ids=PICTURE.token_ids[12:-1], first_position=12, num_logits=0)],
        [replace(PICTURE, token_ids=PICTURE.token_ids[-1:], first_position=22), token(9, C)],
        [token(10, C), token(23, D)],
    ],
    "log probabilities of prompts": [
        [prompt(0, 30, A), replace(prompt(0, 20, B), num_logits=20)],
        [replace(prompt(20, 1, B), num_logits=1), replace(prompt(0, 40, D), num_logits=40)],
        [token(30, A), replace(prompt(0, 7, C), num_logits=7), token(40, D), token(21, B)],
    ],
    "more prompts than a graph has": [
        [prompt(0, 3 + block, [block], is_last=block != 2) for block in range(11)],
        [token(3 + block, [block]) for block in (10, 0)] + [prompt(5, 2, [2])],
    ],
    "more rows than a graph has": [
        [prompt(0, 50, A)],
        [prompt(0, 280, E), token(50, A), prompt(0, 140, F)],
        [token(280, E), token(51, A), token(140, F)],
    ],
}


@pytest.mark.parametrize("name", SCENES)
def test_every_mixture_of_prompts_and_tokens_gives_the_oracles_logits(
    models: tuple[DecoderModel, DecoderModel], name: str
) -> None:
    for steps in SCENES[name]:
        expected, found = (model.forward(steps) for model in models)
        assert found.shape == expected.shape == (sum(s.num_logits for s in steps), 512)
        assert len(found) == 0 or relative_error(found, expected) < KERNEL_LOGITS


@pytest.mark.parametrize("name", SCENES)
def test_rows_that_nobody_writes_disturb_nobody(
    models: tuple[DecoderModel, DecoderModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention leaves padding as the memory was, and that goes through every later layer."""

    def made_of_nan(num_rows: int, *shape: int, **options: Any) -> torch.Tensor:
        whole = torch.empty(num_rows, *shape, **options)
        whole.view(torch.uint8).fill_(0xFF)  # NaN in every type
        return whole

    monkeypatch.setattr(hopper_attention, "empty_with_spare_rows", made_of_nan)
    for steps in SCENES[name]:
        expected, found = (model.forward(steps) for model in models)
        assert len(found) == 0 or relative_error(found, expected) < KERNEL_LOGITS


def test_contexts_that_do_not_fit_at_once_are_gathered_one_after_another(
    models: tuple[DecoderModel, HopperModel],
    calls: list[tuple[str, list[torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With memory for 320 positions, of which a context takes a multiple of 64."""
    fast = models[1]
    whole = fast._attention
    monkeypatch.setattr(fast, "_attention", replace(whole, k=whole.k[:, :320], v=whole.v[:, :320]))
    monkeypatch.setattr(fast._chunks, "_k", whole.k[:, :320])
    scenes = [
        ([prompt(0, 200, G), prompt(0, 60, B)], {260}),
        ([prompt(0, 280, E), prompt(0, 32, C), prompt(0, 64, F)], {280, 32 + 64}),
        ([prompt(200, 9, G), prompt(60, 4, B)], {64}),
        ([prompt(280, 8, E), prompt(64, 5, F)], {8, 5}),
    ]
    for steps, counts in scenes:
        calls.clear()
        expected, found = (model.forward(steps) for model in models)
        assert relative_error(found, expected) < KERNEL_LOGITS
        assert {len(tensors[0]) for name, tensors in calls if name == "chunk_attention"} == counts


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
    for max_num_tokens in (40, MAX_SEQ_LEN + 80, 10 * MAX_SEQ_LEN):
        fast.warm_up(max_num_tokens)
    expected, found = (model.forward([token(50, A)]) for model in models)
    assert relative_error(found, expected) < KERNEL_LOGITS


@pytest.mark.parametrize("max_seq_len", [2, 8, 16, 40])
def test_warming_up_takes_no_position_that_requests_have_not(
    engine_dir: Path, max_seq_len: int
) -> None:
    open_fast(engine_dir, max_seq_len=max_seq_len).warm_up(100)


@pytest.mark.parametrize("max_batch_size", [1, 5, 300])
def test_ranks_share_room_for_the_rows_of_every_graph(
    engine_dir: Path, max_batch_size: int
) -> None:
    """Padding makes a step larger than max_num_tokens."""
    engine = EngineDir.read(engine_dir)
    fast = open_fast(engine_dir, max_batch_size=max_batch_size)
    most_rows = max(size.num_decoding + size.num_chunk_rows for size in fast.graph_sizes())
    limits = replace(engine.limits, max_batch_size=max_batch_size, max_num_tokens=max_batch_size)
    for tp_size in (2, 4):
        config = replace(engine.checkpoint_config, tp_size=tp_size)
        values = tp_size * rows_of_a_rank(most_rows, tp_size) * config.decoder.hidden_size
        shared = places(config, limits)
        assert shared["parts"].shape[1] >= values <= shared["norms"].shape[0]


def test_warming_up_leaves_nothing_to_compile(
    models: tuple[DecoderModel, HopperModel], calls: list[tuple[str, list[torch.Tensor]]]
) -> None:
    """Triton compiles a kernel anew for a number that 16 divides."""
    models[1].warm_up(100)
    rows = {len(tensors[0]) for name, tensors in calls if name == "gate_up_swiglu"}
    assert rows == {100, 16, 2}


def test_warming_up_takes_prompts_whose_contexts_are_split_otherwise(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of splits is a kernel; with few KV heads these lengths have one of their own."""
    launched: list[int] = []
    monkeypatch.setattr(PlainForms, "chunk_attention", lambda _, q, *rest: launched.append(len(q)))
    open_fast(engine_dir, max_batch_size=1, max_seq_len=1100).warm_up(1100)
    assert {*launched} == {1100, 1024, 512, 16, 2}


def test_one_request_is_given_the_graphs_of_its_answers_alone(
    models: tuple[DecoderModel, HopperModel],
    calls: list[tuple[str, list[torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its prompt is computed once, and runs the same kernels without a graph."""
    captured: list[StepSize] = []
    monkeypatch.setattr(StepGraphs, "capture", lambda _, size, run: captured.append(size))
    models[1].warm_up(100, use_graphs=True, answers_once=True)
    assert captured == [size for size in models[1].graph_sizes() if size.num_chunk_rows == 0]
    assert len(captured) < len(models[1].graph_sizes())
    assert not calls


def test_warming_up_takes_a_step_of_every_prompt_that_fits(
    models: tuple[DecoderModel, HopperModel], calls: list[tuple[str, list[torch.Tensor]]]
) -> None:
    """Whose activations take the most memory."""
    for max_num_tokens, most in ((300, 300), (10_000, MAX_BATCH_SIZE * MAX_SEQ_LEN)):
        calls.clear()
        models[1].warm_up(max_num_tokens)
        rows = {len(tensors[0]) for name, tensors in calls if name == "gate_up_swiglu"}
        assert rows == {most, 16, 2}


def test_what_attention_takes_begins_at_16_bytes(
    models: tuple[DecoderModel, HopperModel], calls: list[tuple[str, list[torch.Tensor]]]
) -> None:
    """Triton would compile its kernel anew for one that does not."""
    for name in ("decoding beside prompts", "more rows than a graph has"):
        for steps in SCENES[name]:
            models[1].forward(steps)
    names = {"rope_append", "decode_attention", "chunk_attention"}
    assert {name for name, _ in calls} >= names
    for name, tensors in calls:
        places = [x.data_ptr() % 16 if x.dim() else 0 for x in tensors]
        assert name not in names or not any(places), f"{name}: {places}"


@pytest.mark.parametrize(
    ("max_batch_size", "sizes"),
    [(1, [1]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16]), (1000, None)],
)
def test_batch_sizes_end_at_the_largest_batch(max_batch_size: int, sizes: list[int] | None) -> None:
    found = batch_sizes(max_batch_size)
    assert found == sorted(set(found))
    assert found == sizes if sizes else found[-1] == 256
