"""The decoder on tensor parallel ranks: the leader sends each step and all ranks run it."""

from __future__ import annotations

from dataclasses import replace

import torch

from nvlm.formats.safetensors_reader import TensorSource
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.kv_blocks import count_blocks
from runtime.decoder.models.open_model import OpenedModel, load_model
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import SequenceStep
from runtime.engine.engine_dir import EngineDir
from runtime.ranks.process_group import ProcessGroup

StepMessage = list[tuple[SequenceStep, int | None]]
"""Steps without their prompt tables, and the tables' numbers of rows."""


def open_parallel_model(
    engine: EngineDir,
    device: torch.device,
    group: ProcessGroup,
    source: TensorSource | None = None,
    *,
    use_graphs: bool = False,
) -> OpenedModel:
    """Collective. As `open_model`, on ranks; the leader's model leads the others' from then on.
    use_graphs: they would hold the reductions, which no two GPUs have run yet."""
    job = group.job
    # One scheduler's numbers must hold on every rank.
    num_blocks = min(
        job.gather(job.agree(lambda: count_blocks(engine, device, job.world.local_size)))
    )
    own = job.agree(
        lambda: load_model(
            engine, device, num_blocks, source, rank=group.rank, all_reduce=group.all_reduce
        )
    )
    own.warm_up(engine.limits.max_num_tokens, use_graphs=use_graphs)
    vocab_size = engine.checkpoint_config.decoder.vocab_size
    return OpenedModel(ParallelModel(own, group, vocab_size), num_blocks)


class ParallelModel:
    """`DecoderModel` of the leader; on a worker its construction is all.

    own: this rank's model, on its shards of the weights and of the KV cache.
    """

    def __init__(self, own: HopperModel | PlainModel, group: ProcessGroup, vocab_size: int) -> None:
        self._own, self._group, self._vocab_size = own, group, vocab_size
        group.on("step", self._follow)
        group.on("warm up", own.warm_up_thread)

    def warm_up_thread(self, max_num_tokens: int) -> None:
        with self._group.leading("warm up", max_num_tokens):
            self._own.warm_up_thread(max_num_tokens)

    def close(self) -> None:
        """Ends the workers' `follow`."""
        self._group.close()

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        message: StepMessage = [
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
                    self._group.broadcast(step.prompt_table.to(self._own.embedding).contiguous())
            logits = self._group.gather_columns(self._own.forward(steps))
        assert logits is not None
        return logits[:, : self._vocab_size]  # the head is padded to equal shards

    @torch.inference_mode()
    def _follow(self, message: StepMessage) -> None:
        self._group.job.phase(_phase([step for step, _ in message]))
        steps = [replace(step, prompt_table=self._receive(num_rows)) for step, num_rows in message]
        self._group.gather_columns(self._own.forward(steps))

    def _receive(self, num_rows: int | None) -> torch.Tensor | None:
        if num_rows is None:
            return None
        like = self._own.embedding  # in whose type and width prompt tables travel
        return self._group.broadcast(like.new_empty(num_rows, like.shape[1]))


def _phase(steps: list[SequenceStep]) -> str:
    is_prefill = any(step.first_position == 0 or len(step.token_ids) > 1 for step in steps)
    return "prefill" if is_prefill else "decode"
