"""What every `DecoderExecutor` promises, on engines with small limits."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from build.conversion.convert import ConvertOptions
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.executor import (
    DecoderExecutor,
    DecoderOptions,
    DecoderRequest,
    StepOutput,
    create_decoder_executor,
)
from runtime.decoder.guidance import Guidance
from runtime.engine.engine_dir import EngineDir
from runtime.requests.guide import Guide, GuideName
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import FinishReason
from tests.conftest import Workshop
from tests.doubles.tensorrt_llm import installed
from tests.support.decoding import generate

VOCAB_SIZE, HIDDEN_SIZE = 512, 128
MAX_BATCH_SIZE, MAX_INPUT_LEN, MAX_SEQ_LEN = 3, 96, 128
LIMITS = {
    "max_batch_size": MAX_BATCH_SIZE,
    "max_input_len": MAX_INPUT_LEN,
    "max_seq_len": MAX_SEQ_LEN,
    "max_num_tokens": 200,
}
FLOAT32 = ConvertOptions(quant_algo=None, kv_cache_quant_algo=None, dtype="float32")

Answer = tuple[list[int], FinishReason]


@dataclass(frozen=True, slots=True)
class Implementation:
    engine: EngineDir
    device: torch.device

    def open(self) -> DecoderExecutor:
        options = DecoderOptions(gather_logits=True)
        return create_decoder_executor(self.engine, self.device, options)

    @property
    def weights(self) -> Path:
        """A file with the decoder's embedding."""
        if self.engine.decoder_target == "torch":
            return self.engine.directory / "llm" / "rank0.safetensors"
        named = json.loads((self.engine.directory / "llm" / "rank0.engine").read_text())
        return Path(named["checkpoint_dir"]) / "rank0.safetensors"


@pytest.fixture(scope="module")
def float32_engine(workshop, model_dir: Path) -> EngineDir:  # type: ignore[no-untyped-def]
    checkpoint = workshop.checkpoint("checkpoint_float32", model_dir, FLOAT32)
    return EngineDir.read(
        workshop.engine("engine_contract_float32", checkpoint, vision="torch", **LIMITS)
    )


@pytest.fixture(scope="module")
def fp8_engine(workshop, checkpoint_dir: Path) -> EngineDir:  # type: ignore[no-untyped-def]
    return EngineDir.read(
        workshop.engine("engine_contract_fp8", checkpoint_dir, vision="torch", **LIMITS)
    )


@pytest.fixture(scope="module")
def tensorrt_llm_engine(workshop: Workshop, checkpoint_dir: Path) -> EngineDir:
    """With room for the contract's prompt tables, which are longer than those of real images."""
    options = BuildOptions(decoder="tensorrt_llm", vision="torch", **LIMITS)
    spec = specify(checkpoint_dir, options, torch.device("cuda"), 80 << 30)
    limits = replace(spec.limits, max_multimodal_len=MAX_BATCH_SIZE * MAX_INPUT_LEN)
    path = workshop.root / "engine_contract_tensorrt_llm"
    build_engine(replace(spec, limits=limits), path, options)
    return EngineDir.read(path)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("float32_engine", "cpu"), id="torch float32"),
        pytest.param(("fp8_engine", "cpu"), id="torch FP8"),
        pytest.param(("tensorrt_llm_engine", "cuda"), id="TensorRT-LLM double"),
        pytest.param(("fp8_engine", "cuda"), id="torch FP8 cuda", marks=pytest.mark.gpu),
    ],
)
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    fixture, device = request.param
    if fixture == "tensorrt_llm_engine":
        with installed(pytest.importorskip("tensorrt_rtx")):
            yield Implementation(request.getfixturevalue(fixture), torch.device(device))
        return
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    yield Implementation(request.getfixturevalue(fixture), torch.device(device))


@pytest.fixture
def executor(implementation: Implementation) -> Iterator[DecoderExecutor]:
    executor = implementation.open()
    yield executor
    executor.close()


def text(num_tokens: int, seed: int = 0, max_new_tokens: int = 6) -> DecoderRequest:
    rng = random.Random(seed)
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
    return DecoderRequest(token_ids, max_new_tokens)


def with_images(rows_of_images: list[int], seed: int = 0) -> DecoderRequest:
    """Two words, an image, two words, an image, ..., two words."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(2)]
    first = VOCAB_SIZE
    for num_rows in rows_of_images:
        token_ids += range(first, first + num_rows)
        token_ids += [rng.randrange(VOCAB_SIZE) for _ in range(2)]
        first += num_rows
    table = torch.randn(sum(rows_of_images), HIDDEN_SIZE, generator=generator)
    keys = tuple(f"{seed} {i}".encode() for i in range(len(rows_of_images)))
    return DecoderRequest(
        token_ids, 6, prompt_table=table, cache_keys=keys, rows_per_image=tuple(rows_of_images)
    )


MIXED = [
    text(1),
    text(31, seed=1),
    with_images([4], seed=2),
    text(33, seed=3),
    with_images([28], seed=4),
    with_images([4, 12, 20], seed=5),
    text(MAX_INPUT_LEN, seed=6),
    with_images([64], seed=7),
]


def run(executor: DecoderExecutor, *requests: DecoderRequest) -> list[Answer]:
    return generate(executor, list(requests))


def one_by_one(implementation: Implementation, requests: list[DecoderRequest]) -> list[Answer]:
    """Each in an executor that has never seen another."""
    return [run(implementation.open(), request)[0] for request in requests]


def drain(executor: DecoderExecutor) -> list[StepOutput]:
    outputs = []
    while step := executor.step():
        outputs += step
    return outputs


def tokens_of(outputs: list[StepOutput], request_id: int) -> list[int]:
    return [
        output.token_id
        for output in outputs
        if output.request_id == request_id and output.token_id is not None
    ]


def num_free_blocks(executor: DecoderExecutor) -> int:
    """0 where the executor keeps its cache to itself."""
    scheduler = getattr(executor, "scheduler", None)
    return 0 if scheduler is None else scheduler.num_free_blocks


def test_limits_are_those_the_engine_was_built_with(executor: DecoderExecutor) -> None:
    for name, value in LIMITS.items():
        assert getattr(executor.limits, name) == value


def test_a_step_without_requests_gives_nothing(executor: DecoderExecutor) -> None:
    assert executor.step() == []
    run(executor, text(5))
    assert executor.step() == []


def test_a_step_gives_every_running_request_one_token(executor: DecoderExecutor) -> None:
    ids = [executor.submit(text(5, seed)) for seed in range(MAX_BATCH_SIZE)]
    for _ in range(5):
        outputs = executor.step()
        assert sorted(output.request_id for output in outputs) == sorted(ids)
        assert all(output.finish_reason is None for output in outputs)
        assert all(0 <= (output.token_id or 0) < VOCAB_SIZE for output in outputs)
    assert [output.finish_reason for output in executor.step()] == ["length"] * MAX_BATCH_SIZE


def test_ids_are_new_and_ascend_with_submission(executor: DecoderExecutor) -> None:
    ids = [executor.submit(text(3)) for _ in range(3)]
    drain(executor)
    ids += [executor.submit(text(3)) for _ in range(2)]
    assert ids == sorted(set(ids))


def test_equal_requests_give_equal_answers_and_different_ones_differ(
    executor: DecoderExecutor,
) -> None:
    first, second, other = run(executor, text(20), text(20), text(20, seed=1))
    assert first == second
    assert first != other


def test_a_batch_of_different_prompts_equals_one_by_one(implementation: Implementation) -> None:
    together = run(implementation.open(), *MIXED)
    assert together == one_by_one(implementation, MIXED)
    assert len({tuple(ids) for ids, _ in together}) == len(MIXED), "prompts do not matter"


def test_order_of_submission_does_not_change_answers(implementation: Implementation) -> None:
    backwards = run(implementation.open(), *MIXED[::-1])
    assert backwards[::-1] == run(implementation.open(), *MIXED)


def test_a_request_that_joins_while_others_decode_gets_the_tokens_it_gets_alone(
    implementation: Implementation,
) -> None:
    requests = [replace(MIXED[i], max_new_tokens=10 - i) for i in (5, 1, 4)]
    executor = implementation.open()
    outputs, ids = [], []
    for request in requests:
        ids.append(executor.submit(request))
        outputs += executor.step()
        outputs += executor.step()
    outputs += drain(executor)
    expected = one_by_one(implementation, requests)
    assert [tokens_of(outputs, i) for i in ids] == [tokens for tokens, _ in expected]


def test_more_requests_than_max_batch_size_are_all_answered_in_full(
    executor: DecoderExecutor,
) -> None:
    requests = [text(4 + i, seed=i, max_new_tokens=1 + i % 5) for i in range(4 * MAX_BATCH_SIZE)]
    answers = run(executor, *requests)
    assert [len(ids) for ids, _ in answers] == [request.max_new_tokens for request in requests]


def test_never_more_than_max_batch_size_run_in_a_step(executor: DecoderExecutor) -> None:
    for seed in range(3 * MAX_BATCH_SIZE):
        executor.submit(text(4, seed, max_new_tokens=2))
    sizes = []
    while outputs := executor.step():
        sizes.append(len(outputs))
    assert sizes == [MAX_BATCH_SIZE] * 6


@pytest.mark.parametrize(
    "request_", [text(9), text(30), with_images([4, 12])], ids=["9", "30", "images"]
)
def test_an_answer_given_back_as_prompt_continues_as_it_did(
    implementation: Implementation, executor: DecoderExecutor, request_: DecoderRequest
) -> None:
    """Prefill and decode agree on positions and cache, also where a block of 32 is crossed."""
    if (implementation.engine.decoder_target, implementation.device.type) == ("torch", "cuda"):
        pytest.skip("its prompts and decoding round differently: test_hopper_executor.py")
    ((ids, _),) = run(executor, replace(request_, max_new_tokens=16))
    for count in (1, 5, 11):
        longer = [*request_.token_ids, *ids[:count]]
        given_back = replace(request_, token_ids=longer, max_new_tokens=16 - count)
        assert run(executor, given_back) == [(ids[count:], "length")]


class TestEnd:
    def test_max_new_tokens_ends_an_answer_with_reason_length(
        self, executor: DecoderExecutor
    ) -> None:
        (long, _), (short, reason), (one, _) = run(
            executor, *(text(9, max_new_tokens=count) for count in (8, 3, 1))
        )
        assert (len(long), short, reason, one) == (8, long[:3], "length", long[:1])

    def test_max_seq_len_ends_an_answer_with_reason_length(self, executor: DecoderExecutor) -> None:
        for num_tokens in (MAX_INPUT_LEN, MAX_INPUT_LEN - 1):
            request = text(num_tokens, max_new_tokens=10**6)
            ((ids, reason),) = run(executor, request)
            assert (len(ids), reason) == (MAX_SEQ_LEN - num_tokens, "length")

    def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(
        self, executor: DecoderExecutor
    ) -> None:
        request = text(9, max_new_tokens=12)
        ((ids, _),) = run(executor, request)
        cut = next(i for i in range(11, 0, -1) if ids[i] not in ids[:i])
        unused = next(i for i in range(VOCAB_SIZE) if i not in ids)
        stop_ids = frozenset({ids[cut], unused})
        ((stopped, reason),) = run(executor, replace(request, stop_ids=stop_ids))
        assert (stopped, reason) == (ids[:cut], "stop")

    def test_a_stop_token_right_away_gives_an_empty_answer(self, executor: DecoderExecutor) -> None:
        request = text(9)
        ((ids, _),) = run(executor, request)
        executor.submit(replace(request, stop_ids=frozenset(ids[:1])))
        (output,) = executor.step()
        assert (output.token_id, output.finish_reason) == (None, "stop")
        assert executor.step() == []

    def test_stop_tokens_in_the_prompt_do_not_stop(self, executor: DecoderExecutor) -> None:
        request = text(9)
        ((ids, reason),) = run(executor, request)
        stop_ids = frozenset(request.token_ids) - frozenset(ids)
        assert len(stop_ids) > 3
        assert run(executor, replace(request, stop_ids=stop_ids)) == [(ids, reason)]

    def test_one_that_stops_early_leaves_the_others_undisturbed(
        self, executor: DecoderExecutor
    ) -> None:
        requests = [text(9, seed=seed, max_new_tokens=8) for seed in range(3)]
        answers = run(executor, *requests)
        stop = frozenset(answers[1][0][:1])
        again = run(executor, requests[0], replace(requests[1], stop_ids=stop), requests[2])
        assert again == [answers[0], ([], "stop"), answers[2]]


class TestGuides:
    def test_an_answer_matches_its_guide_beside_others_that_have_none(
        self, executor: DecoderExecutor, implementation: Implementation
    ) -> None:
        tokenizer = Tokenizer(implementation.engine.directory / "tokenizer")
        free, other = text(9, seed=1), text(20, seed=2)
        guided = [guided_by(tokenizer, "choice", ["yes", "no"]), *regexes(tokenizer)]
        alone = [run(executor, request)[0] for request in (free, *guided, other)]
        assert run(executor, free, *guided, other) == alone
        (choice, reason), *matching = alone[1:-1]
        assert tokenizer.decode(choice) in ("yes", "no")
        assert reason == "stop"
        for ids, reason in matching:
            assert re.fullmatch("[a-c]{3}", tokenizer.decode(ids))
            assert reason == "stop"

    def test_an_answer_may_be_cut_before_it_matches(
        self, executor: DecoderExecutor, implementation: Implementation
    ) -> None:
        tokenizer = Tokenizer(implementation.engine.directory / "tokenizer")
        request = guided_by(tokenizer, "regex", "[ab]{9}")
        ((ids, reason),) = run(executor, replace(request, max_new_tokens=4))
        assert (len(ids), reason) == (4, "length")
        assert re.fullmatch("[ab]{4}", tokenizer.decode(ids))


def guided_by(tokenizer: Tokenizer, name: GuideName, value: Any) -> DecoderRequest:
    guide = Guide.of(name, value)
    assert guide is not None
    compiled = Guidance(tokenizer, VOCAB_SIZE).compile(guide)
    stop_ids = frozenset({tokenizer.special_id(IM_END)})
    request = replace(text(9), guide=guide, compiled_guide=compiled, stop_ids=stop_ids)
    return replace(request, max_new_tokens=12)


def regexes(tokenizer: Tokenizer) -> list[DecoderRequest]:
    request = guided_by(tokenizer, "regex", "[a-c]{3}")
    return [request, replace(request, sampling=SamplingParams(temperature=1.0, seed=5))]


class TestCancel:
    def test_a_running_request_that_is_cancelled_appears_no_more(
        self, executor: DecoderExecutor
    ) -> None:
        kept_request, gone_request = text(9, seed=1), text(40, seed=2)
        expected = run(executor, kept_request)[0][0]
        free = num_free_blocks(executor)
        kept, gone = executor.submit(kept_request), executor.submit(gone_request)
        outputs = executor.step()
        assert tokens_of(outputs, gone)
        executor.cancel(gone)
        rest = drain(executor)
        assert {output.request_id for output in rest} == {kept}
        assert tokens_of(outputs + rest, kept) == expected
        assert num_free_blocks(executor) == free

    def test_a_waiting_request_that_is_cancelled_never_runs(
        self, executor: DecoderExecutor
    ) -> None:
        ids = [executor.submit(text(5, seed=seed)) for seed in range(MAX_BATCH_SIZE + 2)]
        executor.cancel(ids[-2])
        outputs = drain(executor)
        assert {output.request_id for output in outputs} == set(ids) - {ids[-2]}

    def test_a_cancelled_place_is_taken_after_the_step_in_flight(
        self, executor: DecoderExecutor
    ) -> None:
        ids = [executor.submit(text(5, seed=seed)) for seed in range(MAX_BATCH_SIZE + 1)]
        executor.step()
        executor.cancel(ids[0])
        steps = [{output.request_id for output in executor.step()} for _ in range(2)]
        assert steps[1] == set(ids[1:])
        assert steps[0] in (set(ids[1:]), set(ids[1:-1])), "no place is empty for longer"

    def test_unknown_and_finished_ids_are_fine(self, executor: DecoderExecutor) -> None:
        request = text(5)
        expected = run(executor, request)
        request_id = executor.submit(request)
        executor.cancel(request_id + 1000)
        outputs = drain(executor)
        executor.cancel(request_id)
        executor.cancel(-1)
        assert tokens_of(outputs, request_id) == expected[0][0]
        assert run(executor, request) == expected

    def test_cancelling_everything_leaves_nothing_to_do(self, executor: DecoderExecutor) -> None:
        free = num_free_blocks(executor)
        ids = [executor.submit(text(5, seed=seed)) for seed in range(MAX_BATCH_SIZE + 2)]
        executor.step()
        for request_id in ids:
            executor.cancel(request_id)
        assert executor.step() == []
        assert num_free_blocks(executor) == free


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (DecoderRequest([], 4), "no tokens"),
        (text(MAX_INPUT_LEN + 1), f"{MAX_INPUT_LEN + 1} tokens.*{MAX_INPUT_LEN}.*--max_input_len"),
        (DecoderRequest([1, VOCAB_SIZE, 2], 4), f"1 to {VOCAB_SIZE}, expected 0 to 511"),
        (DecoderRequest([5, -1], 4), "-1 to 5"),
        (replace(with_images([4]), token_ids=[1, VOCAB_SIZE + 4]), "516, expected 0 to 515"),
        (replace(text(4), max_new_tokens=0), "max_new_tokens is 0"),
        (replace(text(4), max_new_tokens=-3), "max_new_tokens is -3"),
    ],
    ids=[
        "empty prompt",
        "too long",
        "virtual id without a table",
        "negative id",
        "id after the table",
        "max_new_tokens 0",
        "max_new_tokens negative",
    ],
)
def test_what_can_never_run_is_refused_and_others_continue(
    executor: DecoderExecutor, request_: DecoderRequest, message: str
) -> None:
    expected = run(executor, text(5))[0][0]
    running = executor.submit(text(5))
    with pytest.raises(UserError, match=message):
        executor.submit(request_)
    assert tokens_of(drain(executor), running) == expected


class TestLogits:
    def test_they_are_a_float32_row_whose_largest_is_the_greedy_token(
        self, executor: DecoderExecutor
    ) -> None:
        ids = [
            executor.submit(replace(request, return_logits=True))
            for request in (text(9), with_images([8]))
        ]
        outputs = drain(executor)
        assert len(outputs) == 6 * len(ids)
        for output in outputs:
            assert output.logits is not None
            assert output.logits.shape == (VOCAB_SIZE,)
            assert output.logits.dtype == torch.float32
            assert output.logits.isfinite().all()
            assert int(output.logits.argmax()) == output.token_id

    def test_they_come_only_to_those_that_ask(self, executor: DecoderExecutor) -> None:
        asks = executor.submit(replace(text(9), return_logits=True))
        executor.submit(text(9))
        for output in executor.step():
            assert (output.logits is not None) == (output.request_id == asks)

    def test_they_come_with_the_stop_token_too(self, executor: DecoderExecutor) -> None:
        first = run(executor, text(9))[0][0][0]
        executor.submit(replace(text(9), return_logits=True, stop_ids=frozenset({first})))
        (output,) = executor.step()
        assert output.logits is not None
        assert int(output.logits.argmax()) == first


class TestSampling:
    SAMPLING = SamplingParams(temperature=1.5, top_k=100, top_p=0.95, seed=7)

    def test_the_same_seed_gives_the_same_answer_whatever_runs_beside_it(
        self, implementation: Implementation
    ) -> None:
        request = replace(text(9), max_new_tokens=12, sampling=self.SAMPLING)
        alone = run(implementation.open(), request)[0]
        crowded = run(implementation.open(), text(30, seed=1), text(3, seed=2), request)[2]
        assert crowded == alone

    def test_seeds_give_different_answers(self, executor: DecoderExecutor) -> None:
        request = replace(text(9), max_new_tokens=12)
        requests = [replace(request, sampling=replace(self.SAMPLING, seed=s)) for s in range(3)]
        assert len({tuple(ids) for ids, _ in run(executor, *requests, request)}) == 4


class TestPromptTable:
    @pytest.fixture
    def embedding(self, implementation: Implementation) -> torch.Tensor:
        with safe_open(implementation.weights, framework="pt") as file:
            table: torch.Tensor = file.get_tensor("transformer.vocab_embedding.weight")
        return table

    @pytest.fixture
    def logits_of(self, executor: DecoderExecutor) -> Callable[[DecoderRequest], torch.Tensor]:
        def logits_of(request: DecoderRequest) -> torch.Tensor:
            executor.submit(replace(request, return_logits=True))
            rows = [output.logits for output in drain(executor)]
            return torch.stack([row for row in rows if row is not None]).cpu()

        return logits_of

    def as_virtual(self, request: DecoderRequest, embedding: torch.Tensor) -> DecoderRequest:
        """The same prompt, its tokens 3 to 11 and 15 to 19 given by rows of the table."""
        token_ids = list(request.token_ids)
        places = [*range(3, 12), *range(15, 20)]
        table = embedding[[token_ids[place] for place in places]]
        for row, place in enumerate(places):
            token_ids[place] = VOCAB_SIZE + row
        return replace(request, token_ids=token_ids, prompt_table=table)

    def test_rows_that_are_words_embeddings_give_exactly_the_words_answer(
        self,
        logits_of: Callable[[DecoderRequest], torch.Tensor],
        embedding: torch.Tensor,
    ) -> None:
        request = text(24)
        virtual = self.as_virtual(request, embedding)
        assert torch.equal(logits_of(virtual), logits_of(request))

    def test_rows_of_two_requests_do_not_mix(
        self, executor: DecoderExecutor, embedding: torch.Tensor
    ) -> None:
        requests = [text(24, seed) for seed in (1, 2)]
        virtual = [self.as_virtual(request, embedding) for request in requests]
        assert run(executor, *virtual) == run(executor, *requests)

    def test_rows_in_another_order_give_another_answer(
        self, logits_of: Callable[[DecoderRequest], torch.Tensor], embedding: torch.Tensor
    ) -> None:
        virtual = self.as_virtual(text(24), embedding)
        assert virtual.prompt_table is not None
        shuffled = replace(virtual, prompt_table=virtual.prompt_table.flip(0))
        assert not torch.allclose(logits_of(virtual), logits_of(shuffled), atol=1e-3)

    def test_two_images_exchanged_give_another_answer_unless_their_ids_are_exchanged_too(
        self, logits_of: Callable[[DecoderRequest], torch.Tensor]
    ) -> None:
        request = with_images([4, 4])
        assert request.prompt_table is not None
        exchanged = replace(request, prompt_table=request.prompt_table.roll(4, dims=0))
        swap = {VOCAB_SIZE + i: VOCAB_SIZE + (i + 4) % 8 for i in range(8)}
        both = replace(exchanged, token_ids=[swap.get(i, i) for i in exchanged.token_ids])
        expected = logits_of(request)
        assert not torch.allclose(logits_of(exchanged), expected, atol=1e-3)
        assert torch.equal(logits_of(both), expected)

    def test_a_row_may_be_used_twice_and_another_not_at_all(
        self, logits_of: Callable[[DecoderRequest], torch.Tensor], embedding: torch.Tensor
    ) -> None:
        table = embedding[[7, 8, 9]]
        used = DecoderRequest([1, VOCAB_SIZE + 2, 2, VOCAB_SIZE + 2], 4, prompt_table=table)
        assert torch.equal(logits_of(used), logits_of(DecoderRequest([1, 9, 2, 9], 4)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_a_table_in_another_float_type_is_cast(
        self,
        logits_of: Callable[[DecoderRequest], torch.Tensor],
        embedding: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Eighths are exact in all of them."""
        rows = (embedding[:8].float() * 8).round() / 8
        request = DecoderRequest([1, *range(VOCAB_SIZE, VOCAB_SIZE + 8)], 4, prompt_table=rows)
        cast = replace(request, prompt_table=rows.to(dtype))
        assert torch.equal(logits_of(cast), logits_of(request))

    def test_the_callers_table_is_left_as_it_was(self, executor: DecoderExecutor) -> None:
        request = with_images([8])
        assert request.prompt_table is not None
        before = request.prompt_table.clone()
        run(executor, request)
        assert torch.equal(request.prompt_table, before)


def test_no_block_leaks_over_random_submits_cancels_and_steps(
    implementation: Implementation,
) -> None:
    rng = random.Random(0)
    executor = implementation.open()
    free = num_free_blocks(executor)
    lengths: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    finished: dict[int, FinishReason] = {}
    cancelled: set[int] = set()
    for _ in range(200):
        action = rng.random()
        if action < 0.3:
            request = replace(rng.choice(MIXED), max_new_tokens=rng.randint(1, 12))
            request_id = executor.submit(request)
            lengths[request_id], tokens[request_id] = request.max_new_tokens, []
        elif action < 0.4 and lengths:
            request_id = rng.choice(list(lengths))
            executor.cancel(request_id)
            if request_id not in finished:
                cancelled.add(request_id)
        else:
            for output in executor.step():
                assert output.request_id not in cancelled
                assert output.request_id not in finished
                assert output.token_id is not None
                tokens[output.request_id].append(output.token_id)
                if output.finish_reason:
                    finished[output.request_id] = output.finish_reason
    for output in drain(executor):
        assert output.token_id is not None
        tokens[output.request_id].append(output.token_id)
        if output.finish_reason:
            finished[output.request_id] = output.finish_reason
    assert num_free_blocks(executor) == free
    assert set(finished) | cancelled == set(lengths)
    assert all(len(tokens[i]) == lengths[i] for i in finished)
    assert len(cancelled) >= 5
    assert len(finished) >= 20
    assert run(executor, MIXED[5]) == one_by_one(implementation, [MIXED[5]])


SETTINGS = [
    SamplingParams(presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.5),
    SamplingParams(temperature=1.0, seed=3, min_p=0.125, logit_bias={7: 4.0, 9: -100.0}),
    SamplingParams(temperature=1.0, seed=4, min_tokens=5, presence_penalty=2.0),
]


@pytest.mark.parametrize("params", SETTINGS, ids=["penalties", "biases", "min_tokens"])
def test_settings_change_the_tokens_and_repeat(
    executor: DecoderExecutor, params: SamplingParams
) -> None:
    plain = replace(text(20, max_new_tokens=12), sampling=SamplingParams(seed=params.seed))
    ends = generate(executor, [plain])[0][0]
    asked = replace(plain, sampling=params, bad_words=((ends[0],), (ends[1], ends[2])))
    if params.min_tokens:
        asked = replace(asked, stop_ids=frozenset({ends[0]}))
    first, other, second = generate(executor, [asked, text(9, seed=1), asked])
    assert first == second
    assert other == generate(executor, [text(9, seed=1)])[0]
    assert ends[0] not in first[0]
    assert len(first[0]) >= params.min_tokens


def test_logprobs_come_with_each_token(executor: DecoderExecutor) -> None:
    request = replace(text(20), sampling=SamplingParams(logprobs=True), return_logits=True)
    executor.submit(request)
    found = []
    while outputs := executor.step():
        found += outputs
    assert found
    for output in found:
        assert output.logits is not None
        assert output.logprobs is not None
        expected = output.logits.log_softmax(-1)[output.token_id]
        assert output.logprobs.logprob == pytest.approx(float(expected), abs=1e-4)
