"""The decoder on tensor parallel ranks: the leader sends each step and all ranks run it."""

from __future__ import annotations

from functools import partial

import torch

from nvlm.formats.safetensors_reader import TensorSource
from nvlm.program import startup
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.kv_blocks import count_blocks
from runtime.decoder.models.open_model import OpenedModel, load_model
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import AheadModel, SequenceStep
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on
from runtime.ranks.peer_memory import PeerMemory
from runtime.ranks.process_group import ProcessGroup
from runtime.ranks.step_message import Again, StepDecoder, StepEncoder, StepMessage


def open_parallel_model(
    engine: EngineDir,
    device: torch.device,
    group: ProcessGroup,
    source: TensorSource | None = None,
    *,
    use_graphs: bool = True,
    use_peer_memory: bool = True,
    cache_fraction: float | None = None,
    answers_once: bool = False,
) -> OpenedModel:
    """Collective. As `open_model`, on ranks; the leader's model leads the others' from then on."""
    job = group.job
    # One scheduler's numbers must hold on every rank.
    num_blocks = min(
        job.gather(
            job.agree(
                lambda: count_blocks(
                    engine, device, job.world.local_size, cache_fraction=cache_fraction
                )
            )
        )
    )
    memory = PeerMemory.open(engine, device, group) if use_peer_memory else None
    all_reduce_norm = None
    if memory is not None:
        from runtime.ranks.peer_all_reduce_norm import PeerAllReduceNorm  # Triton is there

        all_reduce_norm = partial(PeerAllReduceNorm, memory)
    with startup.phase("decoder weights"):
        own = job.agree(
            lambda: load_model(
                engine,
                device,
                num_blocks,
                source,
                rank=group.rank,
                all_reduce=group.all_reduce,
                all_reduce_norm=all_reduce_norm,
            )
        )
    with startup.phase("decoder kernels and graphs"), loading_on(device, engine):
        own.warm_up(engine.limits.max_num_tokens, use_graphs=use_graphs, answers_once=answers_once)
    vocab_size = engine.checkpoint_config.decoder.vocab_size
    return OpenedModel(parallel_model(own, group, vocab_size, memory), num_blocks)


def parallel_model(
    own: HopperModel | PlainModel,
    group: ProcessGroup,
    vocab_size: int,
    memory: PeerMemory | None = None,
) -> ParallelModel:
    """Runs ahead where `own` does."""
    if isinstance(own, AheadModel):
        return ParallelAheadModel(own, group, vocab_size, memory)
    return ParallelModel(own, group, vocab_size, memory)


class ParallelModel:
    """`DecoderModel` of the leader; on a worker its construction is all.

    own: this rank's model, on its shards of the weights and of the KV cache. memory: by which
    logits and tokens travel where the ranks share some, else by the group's collectives.
    """

    def __init__(
        self,
        own: HopperModel | PlainModel,
        group: ProcessGroup,
        vocab_size: int,
        memory: PeerMemory | None = None,
    ) -> None:
        self._own, self._group, self._vocab_size = own, group, vocab_size
        self._gather_columns = group.gather_columns if memory is None else memory.gather_columns
        self._broadcast_tokens = group.broadcast if memory is None else memory.broadcast_tokens
        self._encoder, self._decoder = StepEncoder(), StepDecoder()
        group.on("step", self._follow)
        group.on_close(own.close)

    def close(self) -> None:
        """Ends the workers' `follow`."""
        self._group.close()

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        with self._group.leading("step", self._encoder.encode(steps)):
            self._send_tables(steps)
            return self._whole(self._own.forward(steps))

    def _send_tables(self, steps: list[SequenceStep]) -> None:
        self._group.job.phase(_phase(steps))
        for step in steps:
            if step.prompt_table is not None:
                self._group.broadcast(step.prompt_table.to(self._own.embedding).contiguous())

    @torch.inference_mode()
    def _follow(self, message: StepMessage) -> None:
        self._gather_columns(self._own.forward(self._receive(message)))

    def _receive(self, message: StepMessage) -> list[SequenceStep]:
        """A step with its prompt tables."""
        steps = self._decoder.decode(message)
        self._group.job.phase(_phase(steps))
        if not isinstance(message, Again):
            for step, row in zip(steps, message, strict=True):
                if row.num_table_rows is not None:
                    step.prompt_table = self._receive_table(row.num_table_rows)
        return steps

    def _whole(self, columns: torch.Tensor) -> torch.Tensor:
        logits = self._gather_columns(columns)
        assert logits is not None
        return logits[:, : self._vocab_size]  # the head is padded to equal shards

    def _receive_table(self, num_rows: int) -> torch.Tensor:
        like = self._own.embedding  # in whose type and width prompt tables travel
        return self._group.broadcast(like.new_empty(num_rows, like.shape[1]))


class ParallelAheadModel(ParallelModel):
    """`AheadModel` of the leader: the tokens that it drew go to the workers on the device."""

    _own: HopperModel

    def __init__(
        self,
        own: HopperModel,
        group: ProcessGroup,
        vocab_size: int,
        memory: PeerMemory | None = None,
    ) -> None:
        super().__init__(own, group, vocab_size, memory)
        group.on("step ahead", self._follow_ahead)

    @property
    def max_rows_ahead(self) -> int:
        return self._own.max_rows_ahead

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        with self._group.leading("step ahead", self._encoder.encode(steps)):
            self._send_tables(steps)
            return self._whole(self._own.forward_ahead(steps, self._share(token_ids)))

    @torch.inference_mode()
    def _follow_ahead(self, message: StepMessage) -> None:
        steps = self._receive(message)
        num_unknown = sum(step.is_unknown for step in steps)
        token_ids = torch.empty(num_unknown, dtype=torch.int64, device=self._group.device)
        self._gather_columns(self._own.forward_ahead(steps, self._share(token_ids)))

    def _share(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The leader's tokens, if there are any."""
        return self._broadcast_tokens(token_ids) if len(token_ids) else token_ids


def _phase(steps: list[SequenceStep]) -> str:
    is_prefill = any(step.first_position == 0 or len(step.token_ids) > 1 for step in steps)
    return "prefill" if is_prefill else "decode"
