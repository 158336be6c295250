"""Chunked prefill, preemption and reuse of KV blocks change when a token comes, never which."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.planning.limits import EngineLimits
from runtime.decoder import torch_executor
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.open_model import OpenedModel
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import DecoderModel, SequenceStep
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.decoder.sampler import sample_rows
from runtime.decoder.scheduler import UNKNOWN_TOKEN, max_num_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.requests.sampling import SamplingParams
from tests.support.decoding import generate

CPU = torch.device("cpu")
VOCAB_SIZE, HIDDEN_SIZE, MAX_SEQ_LEN = 512, 128, 160
BLOCKS_OF_LONGEST = MAX_SEQ_LEN // 32
ROWS = 40

Open = Callable[..., TorchDecoderExecutor]


@pytest.fixture(scope="module", params=["plain", "fast path"])
def open_executor(engine_dir: Path, request: pytest.FixtureRequest) -> Open:
    """Executors over one set of weights, with the limits a test asks for; the fast path runs the
    plain twins of its kernels."""
    engine = EngineDir.read(engine_dir)
    config = engine.checkpoint_config
    source = open_weights(engine_dir / "llm", config)
    weights = load_weights(source, config, CPU)
    fast_weights = load_hopper_weights(source, config, CPU)

    def open_model(limits: EngineLimits, num_blocks: int) -> DecoderModel:
        if request.param == "plain":
            return PlainModel(config, weights, num_blocks, CPU)
        sizes = limits.max_batch_size, limits.max_seq_len
        return HopperModel(config, *sizes, fast_weights, num_blocks, CPU, PlainForms())

    def open_(num_blocks: int | None = None, **limits: int) -> TorchDecoderExecutor:
        chosen = {"max_batch_size": 4, "max_input_len": 128, "max_seq_len": MAX_SEQ_LEN, **limits}
        engine_ = replace(engine, limits=replace(engine.limits, **chosen))
        num_blocks = num_blocks or max_num_blocks(engine_.limits)
        model = open_model(engine_.limits, num_blocks)
        return TorchDecoderExecutor.over(engine_, OpenedModel(model, num_blocks))

    return open_


def random_request(rng: random.Random) -> DecoderRequest:
    """Text or one of three pictures after one of two heads, then a question of its own."""
    head = [[1, 2, 3], list(range(100, 140))][rng.randrange(2)]
    question = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
    max_new_tokens = rng.randint(8, 32)
    picture = rng.randrange(4)
    if picture == 3:
        return DecoderRequest(head + question, max_new_tokens)
    table = torch.randn(ROWS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(picture))
    return DecoderRequest(
        [*head, *range(VOCAB_SIZE, VOCAB_SIZE + ROWS), *question],
        max_new_tokens,
        prompt_table=table,
        cache_keys=(f"{picture} is its number".encode(),),
        rows_per_image=(ROWS,),
    )


def alone(open_executor: Open, requests: list[DecoderRequest]) -> list[object]:
    """Each in an executor that has never seen another, in one piece."""
    return [generate(open_executor(), [request])[0] for request in requests]


@pytest.mark.parametrize(
    ("num_blocks", "max_num_tokens"),
    [(None, 8192), (None, 17), (BLOCKS_OF_LONGEST + 1, 8192), (BLOCKS_OF_LONGEST, 33)],
    ids=["room for all", "chunks", "few blocks", "chunks and few blocks"],
)
def test_random_mixes_get_the_tokens_that_each_request_gets_alone(
    open_executor: Open, num_blocks: int | None, max_num_tokens: int
) -> None:
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(10)]
    executor = open_executor(num_blocks, max_num_tokens=max_num_tokens)
    assert generate(executor, requests) == alone(open_executor, requests)
    scheduler = executor.scheduler
    assert scheduler.num_reused_tokens > 0
    assert (scheduler.num_preemptions > 0) == (num_blocks is not None)
    assert scheduler.num_free_blocks == (num_blocks or 4 * BLOCKS_OF_LONGEST)


def test_a_prompt_longer_than_a_step_gives_its_token_in_one_call(open_executor: Open) -> None:
    executor = open_executor(max_num_tokens=16)
    request = DecoderRequest(list(range(100)), 3)
    request_id = executor.submit(request)
    assert [output.request_id for output in executor.step()] == [request_id]


def test_the_same_picture_is_computed_once_and_another_anew(open_executor: Open) -> None:
    rng = random.Random(5)
    executor = open_executor()
    first = random_request(rng)
    while first.prompt_table is None or len(first.token_ids) < 80:
        first = random_request(rng)
    other = replace(
        first, prompt_table=torch.randn(ROWS, HIDDEN_SIZE), cache_keys=(b"another picture",)
    )
    unknown = replace(first, cache_keys=(), rows_per_image=())
    reused = []
    for request in (first, first, other, other, unknown, unknown):
        before = executor.scheduler.num_reused_tokens
        assert generate(executor, [request]) == alone(open_executor, [request])
        reused.append(executor.scheduler.num_reused_tokens - before)
    whole = (len(first.token_ids) - 1) // 32 * 32
    text = 3 // 32 if first.token_ids[0] == 1 else 32  # the head before the picture
    assert reused == [0, whole, text, whole, text, text]


def test_out_of_blocks_and_cancelled_the_engine_continues(open_executor: Open) -> None:
    rng = random.Random(1)
    executor = open_executor(BLOCKS_OF_LONGEST, max_num_tokens=24)
    free = executor.scheduler.num_free_blocks
    requests = [random_request(rng) for _ in range(12)]
    tokens: dict[int, list[int]] = {executor.submit(request): [] for request in requests}
    expected = dict(zip(tokens, alone(open_executor, requests), strict=True))
    cancelled: set[int] = set()
    num_steps = 0
    while outputs := executor.step():
        for output in outputs:
            assert output.request_id not in cancelled
            assert output.token_id is not None
            tokens[output.request_id].append(output.token_id)
        num_steps += 1
        if num_steps % 8 == 0:
            gone = rng.choice(sorted(tokens))
            executor.cancel(gone)
            cancelled.add(gone)
    assert executor.scheduler.num_preemptions > 0
    assert executor.scheduler.num_free_blocks == free
    finished = set(tokens) - cancelled
    assert len(finished) > 3
    for request_id in finished:
        assert (tokens[request_id], "length") == expected[request_id]


def with_stop(request: DecoderRequest, answer: list[int], rng: random.Random) -> DecoderRequest:
    """Ends before its time, at a token that it is known to draw."""
    return replace(request, stop_ids=frozenset({rng.choice(answer)}))


@pytest.mark.parametrize(
    ("seed", "max_num_tokens"), [*((seed, 8192) for seed in range(4)), (4, 24), (5, 24)]
)
@pytest.mark.long
def test_steps_ahead_of_the_tokens_change_no_answer(
    open_executor: Open, seed: int, max_num_tokens: int
) -> None:
    """Answers end by a stop token, by length and by cancellation while the next step is in flight,
    requests come meanwhile, and some are sampled or want their logits."""
    rng = random.Random(100 + seed)
    requests = [random_request(rng) for _ in range(14)]
    answers = [ids for ids, _ in alone(open_executor, requests)]  # type: ignore[attr-defined]
    requests = [
        with_stop(request, ids, rng) if rng.random() < 0.5 else request
        for request, ids in zip(requests, answers, strict=True)
    ]
    requests[3] = replace(requests[3], sampling=SamplingParams(0.8, 40, 0.9, 7))
    requests[5] = replace(requests[5], return_logits=True)
    expected = alone(open_executor, requests)
    executor = open_executor(max_num_tokens=max_num_tokens)
    waiting, request_of, found = list(range(14)), {}, {}
    cancelled = set()
    while True:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                index = waiting.pop(0)
                request_of[executor.submit(requests[index])] = index
        outputs = executor.step()
        if not outputs and not waiting:
            break
        for output in outputs:
            index = request_of[output.request_id]
            assert index not in cancelled
            ids, reason = found.setdefault(index, ([], None))
            assert reason is None, "nothing comes after the end"
            if output.token_id is not None:
                ids.append(output.token_id)
            found[index] = ids, output.finish_reason
            if index == 5:
                assert output.logits is not None
                assert int(output.logits.argmax()) in (output.token_id, *requests[5].stop_ids)
        if rng.random() < 0.1 and outputs:
            request_id = rng.choice(outputs).request_id
            executor.cancel(request_id)
            if found[request_of[request_id]][1] is None:
                cancelled.add(request_of[request_id])
    for index in set(range(14)) - cancelled:
        assert found[index] == expected[index], index
    assert len(cancelled) < 12
    assert executor.scheduler.num_free_blocks == 4 * BLOCKS_OF_LONGEST


def test_a_step_that_fails_as_it_draws_can_be_taken_again(
    open_executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step once, be it the next one or one in flight: no token is lost or drawn twice."""
    rng = random.Random(3)
    requests = [random_request(rng) for _ in range(5)]
    expected = alone(open_executor, requests)
    has_failed = True

    def fails_every_second_time(*arguments: Any) -> torch.Tensor:
        nonlocal has_failed
        has_failed = not has_failed
        if not has_failed:
            raise torch.OutOfMemoryError
        return sample_rows(*arguments)

    monkeypatch.setattr(torch_executor, "sample_rows", fails_every_second_time)
    executor = open_executor()
    found: dict[int, list[int | None]] = {executor.submit(each): [] for each in requests}
    num_failures = 0
    while True:
        try:
            outputs = executor.step()
        except torch.OutOfMemoryError:
            num_failures += 1
            continue
        if not outputs:
            break
        for output in outputs:
            found[output.request_id].append(output.token_id)
    assert num_failures > 30
    assert [(ids, "length") for ids in found.values()] == expected
    assert executor.scheduler.num_free_blocks == 4 * BLOCKS_OF_LONGEST


def test_the_fast_path_is_asked_before_its_tokens_are_known_and_continues_after_a_failure(
    engine_dir: Path,
) -> None:
    engine = EngineDir.read(engine_dir)
    limits = replace(engine.limits, max_input_len=128, max_seq_len=MAX_SEQ_LEN)
    engine, config = replace(engine, limits=limits), engine.checkpoint_config
    weights = load_hopper_weights(open_weights(engine_dir / "llm", config), config, CPU)
    model = HopperModel(config, 4, MAX_SEQ_LEN, weights, 64, CPU, PlainForms())
    ahead = model.forward_ahead
    executor = TorchDecoderExecutor.over(engine, OpenedModel(model, 64))
    requests = [DecoderRequest([1, 2, 3, i], 9) for i in range(3)]
    expected = generate(executor, requests)
    asked = []

    def fails_once(steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        asked.append([step.token_ids for step in steps])
        if len(asked) == 2:
            raise torch.OutOfMemoryError
        return ahead(steps, token_ids)

    model.forward_ahead = fails_once  # type: ignore[method-assign]
    ids = [executor.submit(request) for request in requests]
    first = executor.step()
    with pytest.raises(torch.OutOfMemoryError):
        executor.step()
    rest = [output for _ in range(8) for output in executor.step()]
    assert executor.step() == []
    for request_id, answer in zip(ids, expected, strict=True):
        tokens = [each.token_id for each in first + rest if each.request_id == request_id]
        assert (tokens, "length") == answer
    assert asked == 9 * [3 * [[UNKNOWN_TOKEN]]]
