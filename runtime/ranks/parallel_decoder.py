"""The decoder on tensor parallel ranks: each step is told by the leader and run by all."""

from __future__ import annotations

from dataclasses import replace

import torch

from runtime.decoder.models.step import DecoderModel, SequenceStep
from runtime.ranks.process_group import ProcessGroup

Told = list[tuple[SequenceStep, int | None]]
"""Steps without their prompt tables, and the tables' numbers of rows."""


class ParallelModel:
    """`DecoderModel` of the leader; on a worker its construction is all.

    own: this rank's model, on its shards of the weights and of the KV cache. embedding: shows the
    width, type and device that prompt tables travel in.
    """

    def __init__(
        self, own: DecoderModel, group: ProcessGroup, embedding: torch.Tensor, vocab_size: int
    ) -> None:
        self._own, self._group = own, group
        self._embedding, self._vocab_size = embedding, vocab_size
        group.on("step", self._follow)
        group.on("prepare", own.prepare_thread)

    def prepare_thread(self, max_num_tokens: int) -> None:
        with self._group.leading("prepare", max_num_tokens):
            self._own.prepare_thread(max_num_tokens)

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        message: Told = [
            (
                replace(step, prompt_table=None),
                None if step.prompt_table is None else len(step.prompt_table),
            )
            for step in steps
        ]
        with self._group.leading("step", message):
            self._group.job.phase(_phase(steps))
            for step in steps:
                if step.prompt_table is not None:
                    self._group.broadcast(step.prompt_table.to(self._embedding).contiguous())
            logits = self._group.gather_columns(self._own.forward(steps))
        assert logits is not None
        return logits[:, : self._vocab_size]  # the head is padded to equal shards

    @torch.inference_mode()
    def _follow(self, message: Told) -> None:
        self._group.job.phase(_phase([step for step, _ in message]))
        steps = [replace(step, prompt_table=self._receive(num_rows)) for step, num_rows in message]
        self._group.gather_columns(self._own.forward(steps))

    def _receive(self, num_rows: int | None) -> torch.Tensor | None:
        if num_rows is None:
            return None
        like = self._embedding
        return self._group.broadcast(like.new_empty(num_rows, like.shape[1]))


def _phase(steps: list[SequenceStep]) -> str:
    is_prefill = any(step.first_position == 0 or len(step.token_ids) > 1 for step in steps)
    return "prefill" if is_prefill else "decode"
