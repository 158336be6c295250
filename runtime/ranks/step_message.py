"""What the leader sends the workers of a step: the changes since the step before it.

Both sides keep the rows of the last step. A step of the same sequences, each one token further, is
an `Again`, which names only the blocks that were added. In any other step each sequence is a `Row`:
one that was in the last step is named by its place there. A worker so holds one list of blocks a
sequence for as long as the sequence stays, as the leader does.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.decoder.models.step import SequenceStep
from runtime.decoder.scheduler import UNKNOWN_TOKEN


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step."""

    place: int | None  # its row in the last step, None where it was not in it
    new_blocks: list[int]  # after those that it had there
    token_ids: list[int]  # that the step computes
    first_position: int  # of the first of them
    num_table_rows: int | None  # rows of its prompt table, which travels by itself
    num_logits: int  # of so many tokens, the last


@dataclass(frozen=True, slots=True)
class Again:
    """The sequences of the last step, each with the one token that follows."""

    new_blocks: dict[int, list[int]]  # by row, where any were added
    token_ids: list[int] | None  # one a row, None where all are unknown to the host


StepMessage = Again | list[Row]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What the workers know of a sequence."""

    blocks: list[int]  # the scheduler's own list, which only grows
    num_blocks: int  # how many of them were sent
    end_position: int  # after the tokens that were sent


class StepEncoder:
    """The leader's side. Every message must be decoded, in order."""

    def __init__(self) -> None:
        self._sent: list[_Sent] = []

    def encode(self, steps: list[SequenceStep]) -> StepMessage:
        last = self._sent
        self._sent = [_Sent(step.blocks, len(step.blocks), step.end_position) for step in steps]
        if len(steps) == len(last) and all(map(_follows, steps, last)):
            return _again(steps, last)
        places = {id(sent.blocks): place for place, sent in enumerate(last)}
        rows = []
        for step in steps:
            place = places.get(id(step.blocks))
            table = step.prompt_table
            rows.append(
                Row(
                    place,
                    step.blocks[0 if place is None else last[place].num_blocks :],
                    step.token_ids,
                    step.first_position,
                    None if table is None else len(table),
                    step.num_logits,
                )
            )
        return rows


class StepDecoder:
    """A worker's side."""

    def __init__(self) -> None:
        self._steps: list[SequenceStep] = []

    def decode(self, message: StepMessage) -> list[SequenceStep]:
        """The leader's steps, without their prompt tables. The next call may change them."""
        if isinstance(message, Again):
            self._advance(message)
        else:
            self._steps = [self._step_of(row) for row in message]
        return self._steps

    def _advance(self, message: Again) -> None:
        for row, step in enumerate(self._steps):
            step.first_position = step.end_position
            step.prompt_table = None
            step.num_logits = 1
            known = message.token_ids
            step.token_ids = [UNKNOWN_TOKEN if known is None else known[row]]
        for row, blocks in message.new_blocks.items():
            self._steps[row].blocks += blocks

    def _step_of(self, row: Row) -> SequenceStep:
        blocks = [] if row.place is None else self._steps[row.place].blocks
        blocks += row.new_blocks
        return SequenceStep(row.token_ids, row.first_position, blocks, None, row.num_logits)


def _follows(step: SequenceStep, sent: _Sent) -> bool:
    return (
        step.blocks is sent.blocks
        and step.first_position == sent.end_position
        and len(step.token_ids) == 1
        and step.prompt_table is None
        and step.num_logits == 1
    )


def _again(steps: list[SequenceStep], last: list[_Sent]) -> Again:
    token_ids = [step.token_ids[0] for step in steps]
    is_unknown = all(token_id == UNKNOWN_TOKEN for token_id in token_ids)
    new_blocks = {
        row: step.blocks[sent.num_blocks :]
        for row, (step, sent) in enumerate(zip(steps, last, strict=True))
        if len(step.blocks) > sent.num_blocks
    }
    return Again(new_blocks, None if is_unknown else token_ids)
