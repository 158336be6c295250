"""Settings that change logits, beside Hugging Face's processors and formulas written in numpy.

The logits are the executor's own. The oracles see those and the tokens so far, and nothing else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime.decoder.executor import DecoderExecutor, DecoderRequest, StepOutput
from runtime.requests.sampling import SamplingParams
from tests.support.table_model import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    TableAheadModel,
    TableModel,
    open_table_executor,
)

NUM_STEPS = 64
END_IDS = frozenset({3, 11})

Models = Callable[[int], TableModel]


@dataclass(frozen=True, slots=True)
class Written:
    """What was asked, and a token and the model's logits for each step."""

    request: DecoderRequest
    token_ids: list[int | None]
    logits: list[torch.Tensor]


def write(executor: DecoderExecutor, requests: list[DecoderRequest]) -> list[Written]:
    written = {
        executor.submit(replace(request, return_logits=True)): Written(request, [], [])
        for request in requests
    }
    while outputs := executor.step():
        for output in outputs:
            assert output.logits is not None
            written[output.request_id].token_ids.append(output.token_id)
            written[output.request_id].logits.append(output.logits)
    return list(written.values())


def drawn(scores: NDArray[np.float64], params: SamplingParams, step: int) -> int:
    """The token of processed scores: the likeliest, or by inverse transform."""
    if params.is_greedy:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[order] - scores[order[0]])
    cumulative = np.cumsum(weights)
    uniform = np.random.Generator(np.random.Philox(key=params.seed, counter=[0, 0, 0, step]))
    index = np.searchsorted(cumulative, uniform.random() * cumulative[-1], side="right")
    return int(order[index])


def hugging_face_processors(request: DecoderRequest) -> Any:
    """In the order in which its `generate` has them."""
    transformers = pytest.importorskip("transformers")
    params = request.sampling
    config = transformers.GenerationConfig(
        do_sample=not params.is_greedy,
        repetition_penalty=params.repetition_penalty,
        min_new_tokens=params.min_tokens or None,
        bad_words_ids=[list(word) for word in request.bad_words] or None,
        sequence_bias={(token_id,): bias for token_id, bias in params.logit_bias} or None,
        temperature=params.temperature or None,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p or None,
    )
    config._eos_token_tensor = torch.tensor(sorted(request.stop_ids))
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    return model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=len(request.token_ids),
        device="cpu",
    )


def random_request(rng: random.Random) -> DecoderRequest:
    """Every setting that Hugging Face has, in half of the requests each."""

    def or_(neutral: Any, value: Any) -> Any:
        return rng.choice([neutral, value])

    temperature = rng.choice([0.0, rng.uniform(0.2, 3.0)])
    params = SamplingParams(
        temperature=temperature,
        top_k=or_(0, rng.randint(1, 60)) if temperature else 0,
        top_p=or_(1.0, rng.uniform(0.2, 1.0)),
        min_p=or_(0.0, rng.uniform(0.0, 0.5)),
        seed=rng.randrange(2**64),
        repetition_penalty=or_(1.0, rng.uniform(0.6, 2.5)),
        min_tokens=or_(0, rng.randint(1, NUM_STEPS)),
        logit_bias=or_((), {rng.randrange(VOCAB_SIZE): rng.uniform(-9, 9) for _ in range(5)}),
    )
    words = [
        tuple(rng.choice([0, 1, 2, 5, 7, 8, rng.randrange(12, VOCAB_SIZE)]) for _ in range(length))
        for length in rng.choices([1, 2, 2, 2, 3, 4], k=12)
    ]
    return DecoderRequest(
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))],
        NUM_STEPS,
        stop_ids=END_IDS,
        sampling=params,
        bad_words=tuple(dict.fromkeys(words)) if rng.random() < 0.5 else (),
    )


def test_200_random_settings_give_the_tokens_of_hugging_faces_processors() -> None:
    rng = random.Random(21)
    num_changed = 0
    for round_ in range(10):
        model = TableAheadModel(round_) if round_ % 2 else TableModel(round_)
        requests = [random_request(rng) for _ in range(20)]
        for written in write(open_table_executor(model, max_batch_size=16), requests):
            request, processors = written.request, hugging_face_processors(written.request)
            token_ids = list(request.token_ids)
            for step, (token_id, logits) in enumerate(
                zip(written.token_ids, written.logits, strict=True)
            ):
                scores = processors(torch.tensor([token_ids]), logits[None].clone())[0]
                expected = drawn(scores.double().numpy(), request.sampling, step)
                found = token_id if token_id is not None else expected
                assert found == expected, (round_, step, request)
                if token_id is None:
                    assert expected in END_IDS
                    assert step >= request.sampling.min_tokens
                plain = drawn(
                    logits.double().numpy() / (request.sampling.temperature or 1.0),
                    request.sampling,
                    step,
                )
                num_changed += expected != plain
                token_ids.append(expected)
    assert num_changed > 1000, "the settings change too little to be tested by this"


def penalised(written: Written, step: int) -> NDArray[np.float64]:
    """OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c[j] tokens of the answer
    before; and division or multiplication for what prompt or answer hold."""
    params, request = written.request.sampling, written.request
    scores = written.logits[step].numpy().astype(np.float64)
    answer = [token_id for token_id in written.token_ids[:step] if token_id is not None]
    for token_id in {*request.token_ids, *answer}:
        if token_id < VOCAB_SIZE:
            by = params.repetition_penalty
            scores[token_id] = (
                scores[token_id] * by if scores[token_id] < 0 else scores[token_id] / by
            )
    for token_id, count in Counter(answer).items():
        scores[token_id] -= count * params.frequency_penalty + params.presence_penalty
    return scores / (params.temperature or 1.0)


def pictured_request(rng: random.Random) -> DecoderRequest:
    """Words around 40 rows of a picture."""
    words = [rng.randrange(VOCAB_SIZE) for _ in range(30)]
    words[10:10] = range(VOCAB_SIZE, VOCAB_SIZE + 40)
    return DecoderRequest(
        words,
        NUM_STEPS,
        prompt_table=torch.zeros(40, HIDDEN_SIZE),
        cache_keys=(b"a picture",),
        rows_per_image=(40,),
        sampling=SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            seed=rng.randrange(2**32),
            presence_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            repetition_penalty=rng.choice([1.0, 1.3]),
        ),
    )


@pytest.mark.parametrize("make", [TableModel, TableAheadModel], ids=["in turn", "ahead"])
def test_presence_and_frequency_penalty_follow_openais_formula(make: Models) -> None:
    rng = random.Random(5)
    for round_ in range(4):
        requests = [pictured_request(rng) for _ in range(20)]
        for written in write(open_table_executor(make(round_)), requests):
            for step, token_id in enumerate(written.token_ids):
                scores = penalised(written, step)
                assert token_id == drawn(scores, written.request.sampling, step), (round_, step)


def plain_request(rng: random.Random) -> DecoderRequest:
    return DecoderRequest([rng.randrange(VOCAB_SIZE) for _ in range(20)], NUM_STEPS)


@pytest.mark.parametrize("num_blocks", [None, 16], ids=["room for all", "few blocks"])
@pytest.mark.parametrize("make", [TableModel, TableAheadModel], ids=["in turn", "ahead"])
def test_a_row_is_what_it_is_alone_whatever_runs_beside_it(
    make: Models, num_blocks: int | None
) -> None:
    """With requests that join and leave, that have no settings, and that give up their blocks."""
    rng = random.Random(9)
    requests = [
        rng.choice([random_request, pictured_request, plain_request])(rng) for _ in range(40)
    ]
    executor = open_table_executor(make(1), num_blocks=num_blocks)
    together = [written.token_ids for written in write(executor, requests)]
    assert (executor.scheduler.num_preemptions > 0) == (num_blocks is not None)
    for request, found in zip(requests, together, strict=True):
        (alone,) = write(open_table_executor(make(1)), [request])
        assert found == alone.token_ids


def test_a_request_that_is_cancelled_leaves_its_place_to_another() -> None:
    rng = random.Random(2)
    executor = open_table_executor(TableModel(0), max_batch_size=2)
    for _ in range(7):
        request_id = executor.submit(pictured_request(rng))
        executor.step()
        executor.cancel(request_id)
    request = pictured_request(rng)
    (found,), (alone,) = (
        write(e, [request]) for e in (executor, open_table_executor(TableModel(0)))
    )
    assert found.token_ids == alone.token_ids


@pytest.mark.parametrize("make", [TableModel, TableAheadModel], ids=["in turn", "ahead"])
def test_a_batch_without_settings_takes_the_plain_path(
    make: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are drawn from as they are, and nothing is kept of its tokens."""
    import runtime.decoder.torch_executor as module

    def never(*_: object) -> None:
        raise AssertionError("a batch without settings was processed")

    monkeypatch.setattr(module.LogitsProcessors, "__init__", never)
    monkeypatch.setattr(module.LogprobRows, "of", never)
    rng = random.Random(3)
    requests = [plain_request(rng) for _ in range(5)]
    requests.append(replace(requests[0], sampling=SamplingParams(temperature=1.0, top_p=0.9)))
    for written in write(open_table_executor(make(0)), requests):
        assert len(written.token_ids) == NUM_STEPS


def outputs_of(executor: DecoderExecutor, request: DecoderRequest) -> list[StepOutput]:
    executor.submit(request)
    outputs = []
    while step := executor.step():
        outputs += step
    return outputs


@pytest.mark.parametrize("make", [TableModel, TableAheadModel], ids=["in turn", "ahead"])
def test_logprobs_are_the_models_whatever_the_settings(make: Models) -> None:
    params = SamplingParams(
        temperature=0.5, seed=4, presence_penalty=1.5, top_k=5, logprobs=True, top_logprobs=7
    )
    request = DecoderRequest([5, 6, 7], 40, sampling=params, return_logits=True)
    outputs = outputs_of(open_table_executor(make(3)), request)
    assert len(outputs) == 40
    for output in outputs:
        assert output.logits is not None
        assert output.logprobs is not None
        expected = output.logits.double().log_softmax(-1)
        top = expected.topk(7)
        assert output.logprobs.logprob == pytest.approx(float(expected[output.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in output.logprobs.top] == top.indices.tolist()
        assert [value for _, value in output.logprobs.top] == pytest.approx(
            top.values.tolist(), abs=1e-4
        )


@pytest.mark.parametrize("max_num_tokens", [8192, 16], ids=["one piece", "chunks"])
def test_logprobs_of_the_prompt_bypass_the_reuse_of_its_blocks(max_num_tokens: int) -> None:
    rng = random.Random(1)
    plain = pictured_request(rng)
    asking = replace(plain, sampling=SamplingParams(prompt_logprobs=2), return_logits=True)
    model = TableModel(0)
    executor = open_table_executor(model, max_num_tokens=max_num_tokens)
    outputs_of(executor, replace(plain, sampling=SamplingParams()))  # its blocks are known now
    first, *rest = outputs_of(executor, asking)
    assert first.prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in rest)
    assert len(first.prompt_logprobs) == len(plain.token_ids)
    logits = model._of_token[torch.tensor(plain.token_ids)]
    logits = logits + model._of_position[: len(plain.token_ids)]
    expected = logits.double().log_softmax(-1)
    for place, found in enumerate(first.prompt_logprobs):
        token_id = plain.token_ids[place]
        if place == 0 or token_id >= VOCAB_SIZE:
            assert found is None
            continue
        assert found is not None
        row = expected[place - 1]
        assert found.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [each for each, _ in found.top] == row.topk(2).indices.tolist()
    again, *_ = outputs_of(executor, replace(plain, sampling=SamplingParams()))
    assert again.token_id == first.token_id


def test_requests_of_one_prompt_compute_it_once() -> None:
    rng = random.Random(8)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(150)]
    model = TableModel(0)
    executor = open_table_executor(model, max_num_tokens=64)
    requests = [
        DecoderRequest(prompt, 5, sampling=SamplingParams(temperature=1.0, seed=seed))
        for seed in range(4)
    ]
    first = executor.submit(requests[0])
    ids = [first, *(executor.submit(replace(r, same_prompt_as=first)) for r in requests[1:])]
    found: dict[int, list[int | None]] = {request_id: [] for request_id in ids}
    while outputs := executor.step():
        for output in outputs:
            found[output.request_id].append(output.token_id)
    computed = sum(count for _, count in model.computed if count > 1)
    assert computed == 150 + 3 * (150 % 32), "the blocks were computed more than once"
    for request, token_ids in zip(requests, found.values(), strict=True):
        alone = outputs_of(open_table_executor(TableModel(0)), request)
        assert token_ids == [output.token_id for output in alone]


@pytest.mark.parametrize("when", ["waiting", "decoding"])
def test_a_request_does_not_wait_for_a_prompt_that_nobody_computes_any_more(when: str) -> None:
    prompt = list(range(90))
    executor = open_table_executor(TableModel(0), max_num_tokens=64)
    first = executor.submit(DecoderRequest(prompt, 30))
    second = executor.submit(DecoderRequest(prompt, 5, same_prompt_as=first))
    if when == "decoding":
        executor.step()
    executor.cancel(first)
    found = []
    while outputs := executor.step():
        found += [output.request_id for output in outputs]
    assert found == [second] * 5
