"""One step of the decoder as every rank has to see it: token rows, positions, blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from runtime.decoder.scheduler import Sequence
from runtime.process_group import ProcessGroup


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """`token_ids` run at positions first_position, ...; `prompt_table` only while they are the
    prompt's, for only the prompt holds virtual tokens."""

    token_ids: list[int]
    first_position: int
    blocks: list[int]
    prompt_table: torch.Tensor | None

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceStep:
        is_prompt = sequence.num_cached < sequence.num_prompt_tokens
        table = sequence.request.prompt_table if is_prompt else None
        return cls(sequence.pending, sequence.num_cached, sequence.blocks, table)


def phase(steps: list[SequenceStep]) -> str:
    is_prefill = any(step.first_position == 0 or len(step.token_ids) > 1 for step in steps)
    return "prefill" if is_prefill else "decode"


Told = list[tuple[SequenceStep, int | None]]
"""Steps without their tables, and the tables' numbers of rows."""


def told(steps: list[SequenceStep]) -> Told:
    return [
        (
            replace(step, prompt_table=None),
            None if step.prompt_table is None else len(step.prompt_table),
        )
        for step in steps
    ]


def share_tables(group: ProcessGroup, steps: list[SequenceStep], like: torch.Tensor) -> None:
    """On the leader: every prompt table goes to the workers, in the embedding's type `like`."""
    for step in steps:
        if step.prompt_table is not None:
            group.broadcast(step.prompt_table.to(like).contiguous())


def receive_tables(group: ProcessGroup, message: Told, like: torch.Tensor) -> list[SequenceStep]:
    """On a worker: the steps, whole again."""
    steps = []
    for step, num_rows in message:
        table = None
        if num_rows is not None:
            table = group.broadcast(like.new_empty(num_rows, like.shape[1]))
        steps.append(replace(step, prompt_table=table))
    return steps
