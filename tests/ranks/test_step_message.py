"""A worker decodes from the leader's messages the steps that the leader runs, always."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.decoder.executor import DecoderRequest
from runtime.decoder.models.open_model import OpenedModel
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.ranks.step_message import Again, Row, StepDecoder, StepEncoder

VOCAB_SIZE, HIDDEN_SIZE, MAX_SEQ_LEN = 512, 128, 160
BLOCKS_OF_LONGEST = MAX_SEQ_LEN // 32


class SendingModel:
    """`AheadModel` that sends each step to a worker of its own and draws tokens at random."""

    max_rows_ahead = 8

    def __init__(self, seed: int) -> None:
        self._encoder, self._decoder = StepEncoder(), StepDecoder()
        self._generator = torch.Generator().manual_seed(seed)
        self._lists: dict[int, list[int]] = {}  # the worker's, by identity of the leader's
        self._kept: list[list[int]] = []  # so that no identity comes again
        self._last: set[int] = set()
        self.messages: list[Again | list[Row]] = []

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        self._send(steps)
        return torch.randn(
            sum(step.num_logits for step in steps), VOCAB_SIZE, generator=self._generator
        )

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        assert token_ids.shape == (sum(step.is_unknown for step in steps),)
        return self.forward(steps)

    def _send(self, steps: list[SequenceStep]) -> None:
        message = pickle.loads(pickle.dumps(self._encoder.encode(steps)))
        found = self._decoder.decode(message)
        self.messages.append(message)
        assert found == [replace(step, prompt_table=None) for step in steps]
        if isinstance(message, Again):
            assert all(step.prompt_table is None for step in steps)
        else:
            rows = [None if s.prompt_table is None else len(s.prompt_table) for s in steps]
            assert [row.num_table_rows for row in message] == rows
        for sent, received in zip(steps, found, strict=True):
            if id(sent.blocks) in self._last:
                assert received.blocks is self._lists[id(sent.blocks)], "one list a sequence"
            self._lists[id(sent.blocks)] = received.blocks
            self._kept.append(sent.blocks)
        self._last = {id(step.blocks) for step in steps}

    def close(self) -> None: ...


class WaitingModel(SendingModel):
    """The same without running ahead: every token is known and travels."""

    max_rows_ahead = 0


def random_request(rng: random.Random) -> DecoderRequest:
    """Half of them with a prompt table; stop tokens end some before their time."""
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
    stop_ids = frozenset(rng.sample(range(VOCAB_SIZE), rng.choice((0, 40))))
    num_rows = rng.choice((0, 40))
    table = torch.zeros(num_rows, HIDDEN_SIZE) if num_rows else None
    token_ids += range(VOCAB_SIZE, VOCAB_SIZE + num_rows)
    return DecoderRequest(token_ids, rng.randint(1, 50), table, stop_ids=stop_ids)


@pytest.mark.parametrize(
    ("num_blocks", "max_num_tokens"),
    [(64, 8192), (64, 17), (2 * BLOCKS_OF_LONGEST, 8192), (BLOCKS_OF_LONGEST, 33)],
    ids=["room for all", "chunks", "few blocks", "chunks and few blocks"],
)
@pytest.mark.parametrize("kind", [SendingModel, WaitingModel], ids=["ahead", "waiting"])
def test_decoded_is_sent_over_random_batches(
    engine_dir: Path, kind: type[SendingModel], num_blocks: int, max_num_tokens: int
) -> None:
    rng = random.Random(0)
    engine = EngineDir.read(engine_dir)
    limits = replace(
        engine.limits,
        max_batch_size=6,
        max_input_len=128,
        max_seq_len=MAX_SEQ_LEN,
        max_num_tokens=max_num_tokens,
    )
    model = kind(seed=1)
    engine = replace(engine, limits=limits)
    executor = TorchDecoderExecutor.over(engine, OpenedModel(model, num_blocks))
    ids: list[int] = []
    waiting = 150
    while True:
        for _ in range(rng.choice((0, 0, 0, 1, 4))):
            if waiting:
                ids.append(executor.submit(random_request(rng)))
                waiting -= 1
        if not executor.step() and not waiting:
            break
        if ids and rng.random() < 0.05:
            executor.cancel(rng.choice(ids))
    again = [message for message in model.messages if isinstance(message, Again)]
    assert len(model.messages) > 200
    assert len(again) > 40
    assert any(message.new_blocks for message in again)
    assert any(message.token_ids is None for message in again) == (kind is SendingModel)
    assert (executor.scheduler.num_preemptions > 0) == (num_blocks < 64)


def step(blocks: list[int], position: int, token_id: int = 7) -> SequenceStep:
    return SequenceStep([token_id], position, blocks, None, 1)


def test_a_step_taken_once_more_and_a_sequence_left_out_travel_as_rows() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    first, second = [1, 2], [3]
    forms = []
    for steps in (
        [step(first, 40), step(second, 9)],
        [step(first, 41), step(second, 10)],
        [step(first, 41), step(second, 10)],  # it failed as it drew
        [step(second, 11)],
        [step(first, 42), step(second, 12)],
    ):
        message = encoder.encode(steps)
        assert decoder.decode(message) == steps
        forms.append(message if isinstance(message, Again) else [row.place for row in message])
    assert forms == [[None, None], Again({}, [7, 7]), [0, 1], [1], [None, 0]]


def test_a_batch_that_continues_travels_in_a_few_bytes() -> None:
    encoder = StepEncoder()
    blocks = [list(range(64)) for _ in range(64)]
    encoder.encode([step(each, 2000) for each in blocks])
    message = encoder.encode([step(each, 2001, token_id=-1) for each in blocks])
    assert len(pickle.dumps(("step ahead", message))) < 200
