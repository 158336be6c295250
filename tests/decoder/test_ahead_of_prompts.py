"""Steps that run ahead with prompts among them, against a model whose answers anybody can work out:
the logits after a token are a function of all tokens before it, as they stand in the KV cache."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvlm.planning.limits import EngineLimits
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.sampler import sample_rows
from runtime.decoder.scheduler import UNKNOWN_TOKEN, Scheduler, Sequence
from runtime.decoder.step_bound import StepBound
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.requests.sampling import SamplingParams

VOCAB_SIZE = 50
LIMITS = EngineLimits(
    max_batch_size=4,
    max_input_len=120,
    max_seq_len=160,
    max_num_tokens=8192,
    max_num_images=1,
    max_multimodal_len=0,
)
BLOCKS_OF_LONGEST = 5


def logits_after(prefix: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(prefix) % 2**63)
    return 3 * torch.randn(VOCAB_SIZE, generator=generator)


def answer_of(request: DecoderRequest) -> list[int]:
    """By the definition alone."""
    prefix, answer = list(request.token_ids), list[int]()
    while len(answer) < min(request.max_new_tokens, LIMITS.max_seq_len - len(request.token_ids)):
        logits = logits_after(tuple(prefix))[None]
        token_id = int(sample_rows(logits, [request.sampling], [len(answer)])[0])
        if token_id in request.stop_ids:
            break
        answer.append(token_id)
        prefix.append(token_id)
    return answer


class PrefixModel:
    """`AheadModel` over a cache of tokens by slot. A sequence sees what steps before wrote, and
    what it writes itself."""

    max_rows_ahead = 64

    def __init__(self) -> None:
        self._cache: dict[int, int] = {}
        self.num_ahead = self.num_prompts_ahead = 0

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        rows, written = [torch.empty(0, VOCAB_SIZE)], dict[int, int]()
        for step in steps:
            slots = [
                step.blocks[position // TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK
                + position % TOKENS_PER_BLOCK
                for position in range(step.end_position)
            ]
            own = dict(zip(slots[step.first_position :], step.token_ids, strict=True))
            assert UNKNOWN_TOKEN not in own.values()
            assert not own.keys() & written.keys(), "two sequences write one slot"
            written |= own
            if step.num_logits:
                seen = self._cache | own
                rows.append(logits_after(tuple(seen[slot] for slot in slots))[None])
        self._cache |= written
        return torch.cat(rows)

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        drawn = iter(token_ids.tolist())
        known = [
            replace(each, token_ids=[next(drawn)]) if each.is_unknown else each for each in steps
        ]
        assert next(drawn, None) is None, "a token for each that is unknown"
        self.num_ahead += 1
        self.num_prompts_ahead += any(len(step.token_ids) > 1 for step in steps)
        return self.forward(known)

    def close(self) -> None: ...


def random_request(rng: random.Random) -> DecoderRequest:
    """Some begin alike, some are drawn, some end by a stop token."""
    prompt = list(range(rng.choice((0, 0, 40, 70))))
    prompt += [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 50))]
    sampling = SamplingParams(0.9, 20, 0.9, rng.randrange(99)) if rng.random() < 0.4 else None
    stop_ids = frozenset(rng.sample(range(VOCAB_SIZE), rng.choice((0, 0, 6))))
    request = DecoderRequest([each % VOCAB_SIZE for each in prompt], rng.randint(1, 40))
    return replace(request, stop_ids=stop_ids, sampling=sampling or SamplingParams())


@dataclass(frozen=True)
class Case:
    num_blocks: int
    max_num_tokens: int
    bound: StepBound | None = None


CASES = {
    "room for all": Case(4 * BLOCKS_OF_LONGEST, 8192),
    "chunks": Case(4 * BLOCKS_OF_LONGEST, 17),
    "bounded": Case(4 * BLOCKS_OF_LONGEST, 8192, StepBound(30.0, ((1, 64.0), (3, 32.0)))),
    "few blocks": Case(BLOCKS_OF_LONGEST + 1, 8192),
    "few blocks, bounded": Case(BLOCKS_OF_LONGEST + 2, 64, StepBound(30.0, ((1, 32.0),))),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CASES)
def test_every_answer_is_the_one_that_the_definition_gives(name: str, seed: int) -> None:
    """Requests come, end and are cancelled while a step is in flight, several of one prompt."""
    case, rng = CASES[name], random.Random(seed)
    config: Any = SimpleNamespace(decoder=SimpleNamespace(vocab_size=VOCAB_SIZE, hidden_size=8))
    limits, model = replace(LIMITS, max_num_tokens=case.max_num_tokens), PrefixModel()
    executor = TorchDecoderExecutor(config, limits, model, case.num_blocks, case.bound)
    requests: dict[int, DecoderRequest] = {}
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    left = 30
    while True:
        while left and rng.random() < 0.4:
            left -= 1
            request = random_request(rng)
            first = executor.submit(request)
            requests[first], found[first] = request, []
            if rng.random() < 0.2:
                other = replace(request, same_prompt_as=first, sampling=SamplingParams(1.0, seed=5))
                second = executor.submit(other)
                requests[second], found[second] = other, []
        outputs = executor.step()
        if not outputs and not left:
            break
        for output in outputs:
            assert output.request_id not in ended, "nothing comes after the end"
            if output.token_id is not None:
                found[output.request_id].append(output.token_id)
            if output.finish_reason is not None:
                ended.add(output.request_id)
        if outputs and rng.random() < 0.05:
            gone = rng.choice(sorted(requests))
            executor.cancel(gone)
            ended.add(gone)
    for request_id, request in requests.items():
        answer = answer_of(request)
        assert request_id in ended
        assert found[request_id] == answer[: len(found[request_id])]
    assert sum(found[each] == answer_of(requests[each]) for each in found) > 20
    assert executor.scheduler.num_free_blocks == case.num_blocks
    assert model.num_prompts_ahead > 5
    assert model.num_ahead > 2 * model.num_prompts_ahead


def sequence(request_id: int, num_prompt_tokens: int, **sampling: int) -> Sequence:
    token_ids = [100 * request_id + i for i in range(num_prompt_tokens)]
    request = DecoderRequest(token_ids, 8, sampling=SamplingParams(**sampling))  # type: ignore[arg-type]
    return Sequence(request_id, request, num_prompt_tokens + 8, list(token_ids))


def launch(tested: Scheduler, *, is_ahead: bool = False) -> list[tuple[int, int]]:
    """A step whose tokens stay unknown: who is in it, with how many tokens."""
    scheduled = tested.schedule_ahead() if is_ahead else tested.schedule()
    found = [(each.request_id, each.num_scheduled) for each in scheduled]
    for each in scheduled:
        if each.is_last_chunk:
            each.token_ids.append(UNKNOWN_TOKEN)
    tested.advance(scheduled)
    return found


class TestScheduledAhead:
    def test_a_prompt_continues_and_another_joins(self) -> None:
        tested = Scheduler(replace(LIMITS, max_num_tokens=40), 20)
        tested.add(sequence(0, 10))
        tested.add(sequence(1, 50))
        assert launch(tested) == [(0, 10), (1, 30)]
        tested.add(sequence(2, 60))
        assert launch(tested, is_ahead=True) == [(0, 1), (1, 20), (2, 19)]

    def test_the_bound_holds_there_too(self) -> None:
        tested = Scheduler(LIMITS, 20, StepBound(30.0, ((1, 64.0),)))
        tested.add(sequence(0, 10))
        launch(tested)
        tested.add(sequence(1, 100))
        assert launch(tested, is_ahead=True) == [(0, 1), (1, 64)]

    def test_a_last_token_of_a_prompt_is_known_and_counts_as_one_that_decodes(self) -> None:
        tested = Scheduler(replace(LIMITS, max_num_tokens=40), 20)
        tested.add(sequence(0, 10))
        tested.add(sequence(1, 31))
        launch(tested)
        assert launch(tested, is_ahead=True) == [(0, 1), (1, 1)]

    def test_a_place_that_comes_free_is_waited_for(self) -> None:
        tested = Scheduler(replace(LIMITS, max_batch_size=1), 20)
        ending = sequence(0, 10)
        ending.max_num_tokens = 11
        tested.add(ending)
        launch(tested)
        tested.add(sequence(1, 10))
        assert launch(tested, is_ahead=True) == []

    def test_log_probabilities_of_a_prompt_are_waited_for(self) -> None:
        tested = Scheduler(LIMITS, 20)
        tested.add(sequence(0, 10))
        launch(tested)
        tested.add(sequence(1, 10, prompt_logprobs=1))
        assert launch(tested, is_ahead=True) == []

    def test_what_it_refuses_changes_nobody(self) -> None:
        tested = Scheduler(LIMITS, 5)
        tested.add(sequence(0, 32))
        tested.add(sequence(1, 128))
        launch(tested)
        assert tested.num_free_blocks == 0
        assert launch(tested, is_ahead=True) == []
        assert tested.num_running == 2
