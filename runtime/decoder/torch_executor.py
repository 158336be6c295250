"""The embedded decoder: a TensorRT-LLM checkpoint run by plain PyTorch, on any device.

Computes exactly what the numerics contract says (docs/decisions.md), so it is the oracle of every
faster path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nvlm.checkpoint_config import CheckpointConfig
from nvlm.decoder_model import (
    Attend,
    causal_attention,
    embed,
    rms_norm,
    rope_tables,
)
from nvlm.errors import UserError
from nvlm.limits import EngineLimits
from nvlm.memory import total_memory_bytes
from nvlm.plan import plan_engine
from runtime.decoder.executor import DecoderRequest, StepOutput, check_request
from runtime.decoder.kv_cache import PagedKVCache
from runtime.decoder.scheduler import Scheduler, Sequence, num_blocks_for
from runtime.decoder.step import (
    SequenceStep,
    Told,
    phase,
    receive_tables,
    share_tables,
    told,
)
from runtime.decoder.torch_weights import DecoderWeights, load_weights
from runtime.engine_dir import EngineDir
from runtime.process_group import ProcessGroup
from runtime.sampling import sample


class TorchDecoderExecutor:
    """`DecoderExecutor` on one device, or on a rank of a tensor parallel `group`.

    The leader alone schedules and samples: workers run the rows it tells them of, on their shard of
    the weights and of the KV cache.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        limits: EngineLimits,
        weights: DecoderWeights,
        device: torch.device,
        group: ProcessGroup | None = None,
    ) -> None:
        self.limits = limits
        self._config = config
        self._weights = weights
        self._device = device
        num_blocks = limits.max_batch_size * num_blocks_for(limits.max_seq_len)
        self._cache = PagedKVCache(config, num_blocks, weights.kv_scales, device)
        self._scheduler = Scheduler(limits, num_blocks)
        self._next_id = 0
        self._group = group
        if group is not None:
            group.on("step", self._follow_step)

    @classmethod
    def load(
        cls, engine: EngineDir, device: torch.device, group: ProcessGroup | None = None
    ) -> TorchDecoderExecutor:
        config, memory_bytes = engine.checkpoint_config, total_memory_bytes(device)
        plan = plan_engine(
            config,
            engine.vision.vision,
            engine.vision_precision,
            engine.limits,
            device,
            memory_bytes,
        )
        # A CPU maps its weights and can page them; the cache has to be there.
        weight_bytes = 0 if device.type == "cpu" else plan.decoder_weight_bytes
        needed_bytes = plan.kv_cache_bytes + weight_bytes
        if device.type == "cpu" and group is not None:
            memory_bytes //= group.job.world.local_size  # ranks of one machine share it
        if needed_bytes > memory_bytes:
            raise UserError(
                f"the KV cache of {engine.directory} takes {plan.kv_cache_bytes / 1e9:.1f} GB and "
                f"its weights {weight_bytes / 1e9:.1f} GB of {device}'s {memory_bytes / 1e9:.1f} "
                "GB; build it with a smaller --max_batch_size or --max_seq_len"
            )
        directory = engine.directory / "llm"
        if group is None:
            return cls(config, engine.limits, load_weights(directory, config, device), device)
        weights = load_weights(directory, config, device, group.rank, group.all_reduce)
        return cls(config, engine.limits, weights, device, group)

    @property
    def scheduler(self) -> Scheduler:
        """For metrics and tests."""
        return self._scheduler

    def submit(self, request: DecoderRequest) -> int:
        decoder = self._config.decoder
        check_request(request, self.limits, decoder.vocab_size, decoder.hidden_size)
        room = self.limits.max_seq_len - len(request.token_ids)
        max_num_tokens = len(request.token_ids) + min(request.max_new_tokens, room)
        self._next_id += 1
        self._scheduler.add(
            Sequence(self._next_id, request, max_num_tokens, list(request.token_ids))
        )
        return self._next_id

    def cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)

    def run_worker(self) -> None:
        assert self._group is not None, "one rank runs this executor"
        self._group.follow()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        sequences = self._scheduler.schedule()
        if not sequences:
            return []
        logits = self._lead_step([SequenceStep.of(sequence) for sequence in sequences])
        return [self._advance(*pair) for pair in zip(sequences, logits, strict=True)]

    def _lead_step(self, steps: list[SequenceStep]) -> torch.Tensor:
        """Float32 logits [num_sequences, vocab_size] of every sequence's last token."""
        if self._group is None:
            return self._forward(steps)
        with self._group.leading("step", told(steps)):
            self._group.job.phase(phase(steps))
            share_tables(self._group, steps, self._weights.embedding)
            logits = self._group.gather_columns(self._forward(steps))
        assert logits is not None
        return logits[:, : self._config.decoder.vocab_size]  # the head is padded to equal shards

    @torch.inference_mode()
    def _follow_step(self, message: Told) -> None:
        assert self._group is not None
        self._group.job.phase(phase([step for step, _ in message]))
        steps = receive_tables(self._group, message, self._weights.embedding)
        self._group.gather_columns(self._forward(steps))

    def _advance(self, sequence: Sequence, logits: torch.Tensor) -> StepOutput:
        """Draws one sequence's token and ends it where it must end."""
        request = sequence.request
        sequence.num_cached = len(sequence.token_ids)
        token_id = sample(logits, request.sampling, sequence.num_generated)
        kept_logits = logits if request.return_logits else None
        if token_id in request.stop_ids:
            self._scheduler.finish(sequence)
            return StepOutput(sequence.request_id, None, "stop", kept_logits)
        sequence.token_ids.append(token_id)
        is_full = len(sequence.token_ids) == sequence.max_num_tokens
        if is_full:
            self._scheduler.finish(sequence)
        return StepOutput(sequence.request_id, token_id, "length" if is_full else None, kept_logits)

    def _forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        """Runs every sequence's rows; float32 logits [num_sequences, rows of this rank's head]."""
        weights, decoder = self._weights, self._config.decoder
        counts = [len(step.token_ids) for step in steps]
        starts = [step.first_position for step in steps]
        hidden = torch.cat([self._embed(step) for step in steps])  # [T, hidden_size]
        positions = torch.cat(
            [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        ).to(self._device)
        slots = torch.cat(
            [
                self._cache.slots(step.blocks, start, count)
                for step, start, count in zip(steps, starts, counts, strict=True)
            ]
        )
        cos, sin = rope_tables(positions, decoder.head_dim, decoder.rope_theta)
        attend_in = self._attention(steps, counts, slots)
        for index, layer in enumerate(weights.layers):
            hidden = layer(hidden, cos, sin, attend_in(index))
        last_rows = torch.tensor(counts, device=self._device).cumsum(0) - 1
        normed = rms_norm(hidden[last_rows], weights.final_norm, decoder.rms_norm_eps)
        logits: torch.Tensor = weights.lm_head(normed)
        return logits

    def _embed(self, step: SequenceStep) -> torch.Tensor:
        token_ids = torch.tensor(step.token_ids, device=self._device)
        embedding, table = self._weights.embedding, step.prompt_table
        table = None if table is None else table.to(self._device)
        return embed(token_ids, embedding, table, embedding.dtype)

    def _attention(
        self, steps: list[SequenceStep], counts: list[int], slots: torch.Tensor
    ) -> Callable[[int], Attend]:
        """For each layer, attention of every sequence over its own blocks of the cache."""

        def attend_in(layer: int) -> Attend:
            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                self._cache.write(layer, slots, k, v)
                outputs = []
                for step, rows in zip(steps, q.split(counts), strict=True):
                    first = step.first_position
                    cached = self._cache.read(layer, step.blocks, first + len(rows))
                    outputs.append(causal_attention(rows, *cached, first))
                return torch.cat(outputs).to(q.dtype)

            return attend

        return attend_in
