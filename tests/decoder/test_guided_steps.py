"""Guided rows of a batch: running ahead, few blocks and company change none of their tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.formats import layout
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder import torch_executor
from runtime.decoder.executor import DecoderRequest, StepOutput
from runtime.decoder.guidance import Guidance
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.open_model import OpenedModel
from runtime.decoder.models.torch_weights import open_weights
from runtime.decoder.scheduler import max_num_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.requests.guide import Guide
from runtime.requests.sampling import SamplingParams
from tests.support.decoding import generate

CPU = torch.device("cpu")
MAX_SEQ_LEN = 160
GUIDES: list[tuple[Any, Any]] = [
    ("regex", "[a-z]{3,30}"),
    ("json_schema", {"type": "array", "items": {"type": "integer"}, "maxItems": 4}),
    ("choice", ["yes", "no", "perhaps"]),
    ("regex", "[ab]{60}"),  # ends with no earlier token
]


@pytest.fixture(scope="module")
def engine(engine_dir: Path) -> EngineDir:
    return EngineDir.read(engine_dir)


@pytest.fixture(scope="module")
def tokenizer(engine: EngineDir) -> Tokenizer:
    return Tokenizer(engine.directory / layout.TOKENIZER)


@pytest.fixture(scope="module")
def open_executor(engine: EngineDir) -> Callable[..., TorchDecoderExecutor]:
    """The fast path on the plain twins of its kernels, which runs ahead."""
    config = engine.checkpoint_config
    weights = load_hopper_weights(open_weights(engine.directory / "llm", config), config, CPU)

    def open_(
        num_blocks: int | None = None, *, runs_ahead: bool = True, **limits: int
    ) -> TorchDecoderExecutor:
        chosen = {"max_batch_size": 4, "max_input_len": 128, "max_seq_len": MAX_SEQ_LEN, **limits}
        engine_ = replace(engine, limits=replace(engine.limits, **chosen))
        num_blocks = num_blocks or max_num_blocks(engine_.limits)
        model = HopperModel(config, 4, MAX_SEQ_LEN, weights, num_blocks, CPU, PlainForms())
        executor = TorchDecoderExecutor.over(engine_, OpenedModel(model, num_blocks))
        if not runs_ahead:
            executor._ahead = None
        return executor

    return open_


@pytest.fixture(scope="module")
def requests(engine: EngineDir, tokenizer: Tokenizer) -> list[DecoderRequest]:
    """Guided and free ones, greedy and drawn, of different lengths."""
    guidance = Guidance(tokenizer, engine.checkpoint_config.decoder.vocab_size)
    rng = random.Random(1)
    found = []
    for number in range(14):
        prompt = [rng.randrange(400) for _ in range(rng.randint(1, 60))]
        request = DecoderRequest(
            prompt,
            rng.randint(30, 90),
            stop_ids=frozenset({tokenizer.special_id(IM_END)}),
            sampling=SamplingParams(temperature=1.0, seed=number)
            if number % 2
            else SamplingParams(),
        )
        if number % 3 != 2:
            guide = Guide.of(*GUIDES[number % len(GUIDES)])
            assert guide is not None
            request = replace(request, guide=guide, compiled_guide=guidance.compile(guide))
        found.append(request)
    return found


def test_running_ahead_and_few_blocks_change_no_guided_answer(
    open_executor: Callable[..., TorchDecoderExecutor], requests: list[DecoderRequest]
) -> None:
    alone = [generate(open_executor(runs_ahead=False), [request])[0] for request in requests]
    assert generate(open_executor(), requests) == alone
    assert generate(open_executor(max_num_tokens=24), requests) == alone
    executor = open_executor(MAX_SEQ_LEN // 32 + 1)
    assert generate(executor, requests) == alone
    assert executor.scheduler.num_preemptions > 0
    assert executor.scheduler.num_free_blocks == MAX_SEQ_LEN // 32 + 1
    assert {reason for _, reason in alone} == {"stop", "length"}


def guided(
    engine: EngineDir, tokenizer: Tokenizer, pattern: str, **settings: Any
) -> Callable[..., DecoderRequest]:
    guidance = Guidance(tokenizer, engine.checkpoint_config.decoder.vocab_size)
    guide = Guide("regex", pattern)

    def request(bad_words: tuple[tuple[int, ...], ...] = (), **sampling: Any) -> DecoderRequest:
        return DecoderRequest(
            tokenizer.encode("q q q What?"),
            80,
            stop_ids=frozenset({tokenizer.special_id(IM_END)}),
            sampling=SamplingParams(**{**settings, **sampling}),
            bad_words=bad_words,
            guide=guide,
            compiled_guide=guidance.compile(guide),
        )

    return request


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_no_setting_lets_through_what_a_guide_rules_out(
    open_executor: Callable[..., TorchDecoderExecutor],
    engine: EngineDir,
    tokenizer: Tokenizer,
    runs_ahead: bool,
) -> None:
    """And beside that each does what it does without one."""
    (a,), (b,), (q,) = map(tokenizer.encode, "abq")
    end = tokenizer.special_id(IM_END)
    twelve = guided(engine, tokenizer, "[ab]{12}")
    any_number = guided(engine, tokenizer, "[ab]{1,60}")
    asked = [
        twelve(logit_bias={q: 100.0, end: 100.0}),
        twelve(repetition_penalty=0.05, presence_penalty=-2.0, frequency_penalty=-2.0),
        twelve(temperature=2.0, seed=3, min_p=0.2, logit_bias={q: 50.0}),
        twelve(logit_bias={a: 100.0}),
        twelve(logit_bias={b: 100.0, q: 100.0}),
        twelve(bad_words=((a,),)),
        any_number(logit_bias={end: 100.0}),
        any_number(logit_bias={end: 100.0}, min_tokens=20),
        guided(engine, tokenizer, "(yes|no)")(min_tokens=40),
        guided(engine, tokenizer, "a")(bad_words=((a,),), logit_bias={q: 100.0}),
    ]
    answers = generate(open_executor(runs_ahead=runs_ahead), asked)
    texts = [tokenizer.decode(ids) for ids, _ in answers]
    assert [reason for _, reason in answers] == ["stop"] * len(asked)
    for request, text in zip(asked, texts, strict=True):
        assert request.guide is not None
        assert re.fullmatch(request.guide.pattern, text)
    assert texts[3:5] == ["a" * 12, "b" * 12]
    assert a not in answers[5][0]
    assert [len(ids) for ids, _ in answers[6:8]] == [1, 20]
    for request, answer in zip(asked, answers, strict=True):
        assert generate(open_executor(runs_ahead=runs_ahead), [request]) == [answer]


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_log_probabilities_of_a_guided_answer_are_the_models(
    open_executor: Callable[..., TorchDecoderExecutor],
    engine: EngineDir,
    tokenizer: Tokenizer,
    runs_ahead: bool,
) -> None:
    ask = guided(engine, tokenizer, "[ab]{9}")
    request = replace(ask(logprobs=True, top_logprobs=3, presence_penalty=1.0), return_logits=True)
    executor = open_executor(runs_ahead=runs_ahead)
    executor.submit(request)
    outputs = [output for step in iter(executor.step, []) for output in step]
    assert tokenizer.decode([output.token_id or 0 for output in outputs]).strip("ab") == ""
    for output in outputs:
        assert output.logits is not None
        assert output.logprobs is not None
        expected = output.logits.double().log_softmax(-1)
        assert output.logprobs.logprob == pytest.approx(float(expected[output.token_id]), abs=1e-4)
        top = expected.topk(3)
        assert [value for _, value in output.logprobs.top] == pytest.approx(
            top.values.tolist(), abs=1e-4
        )
        assert not torch.isinf(expected).any(), "the mask is not the model's"


def test_guided_answers_match(
    open_executor: Callable[..., TorchDecoderExecutor],
    requests: list[DecoderRequest],
    tokenizer: Tokenizer,
) -> None:
    for request, (ids, reason) in zip(requests, generate(open_executor(), requests), strict=True):
        if request.guide is not None and request.guide.name != "json_schema" and reason == "stop":
            assert re.fullmatch(request.guide.pattern, tokenizer.decode(ids))


def test_the_forward_pass_does_not_wait_for_the_masks(
    open_executor: Callable[..., TorchDecoderExecutor],
    requests: list[DecoderRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guided step continues while the host takes the tokens before it; then it is drawn."""
    executor, events = open_executor(), []
    model = executor._ahead
    assert isinstance(model, HopperModel)
    forward, land, apply = model.forward_ahead, executor._land, torch_executor.apply_masks

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(model, "forward_ahead", noted("forward", forward))
    monkeypatch.setattr(executor, "_land", noted("land", land))
    monkeypatch.setattr(torch_executor, "apply_masks", noted("masks", apply))
    long = next(r for r in requests if r.guide is not None and r.guide.text == "[ab]{60}")
    executor.submit(long)
    executor.step()
    executor.step()
    assert events == ["masks", *["forward", "land", "masks"] * 2]


def test_free_batches_are_drawn_before_they_land(
    open_executor: Callable[..., TorchDecoderExecutor],
    requests: list[DecoderRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor, events = open_executor(), []
    draw, land = executor._draw, executor._land
    monkeypatch.setattr(executor, "_draw", lambda *a: (events.append("draw"), draw(*a))[1])
    monkeypatch.setattr(executor, "_land", lambda *a: (events.append("land"), land(*a))[1])
    monkeypatch.setattr(torch_executor, "TokenMasks", None)
    executor.submit(next(request for request in requests if request.guide is None))
    executor.step()
    executor.step()
    assert events == ["draw", *["draw", "land"] * 2]


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_a_guide_that_breaks_ends_its_request_alone(
    open_executor: Callable[..., TorchDecoderExecutor],
    requests: list[DecoderRequest],
    engine: EngineDir,
    tokenizer: Tokenizer,
    runs_ahead: bool,
) -> None:
    guide = Guide("grammar", 'start: "a" x | "bbbb"\nx: /[^\\s\\S]/')
    guidance = Guidance(tokenizer, engine.checkpoint_config.decoder.vocab_size)
    compiled = guidance.compile(guide)
    broken = [
        replace(request, guide=guide, compiled_guide=compiled, sampling=SamplingParams(1.0, seed=i))
        for i, request in enumerate(requests[:6])
    ]
    executor = open_executor(runs_ahead=runs_ahead)
    (others,) = (generate(open_executor(), [requests[2]]),)
    ids = {executor.submit(request): request for request in (*broken, requests[2])}
    outputs: dict[int, list[StepOutput]] = {request_id: [] for request_id in ids}
    while step := executor.step():
        for output in step:
            outputs[output.request_id].append(output)
    errors = [each[-1].error for each in outputs.values() if each[-1].error is not None]
    assert errors
    assert all(isinstance(error, UserError) for error in errors)
    assert "grammar could be followed no further after 1 tokens" in str(errors[0])
    last = list(outputs.values())[-1]
    assert [output.token_id for output in last if output.token_id is not None] == others[0][0]
    assert executor.scheduler.num_free_blocks == max_num_blocks(executor.limits)
