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
from runtime.decoder.block_allocator import num_blocks_for
from runtime.decoder.executor import DecoderRequest, StepOutput, check_request
from runtime.decoder.image_ids import image_keys
from runtime.decoder.kv_cache import PagedKVCache
from runtime.decoder.scheduler import Scheduler, Sequence
from runtime.decoder.torch_weights import DecoderWeights, load_weights
from runtime.engine_dir import EngineDir
from runtime.sampling import sample


class TorchDecoderExecutor:
    """`DecoderExecutor` on one device. num_blocks: of the KV cache; by default every place of the
    batch has room for max_seq_len."""

    def __init__(
        self,
        config: CheckpointConfig,
        limits: EngineLimits,
        weights: DecoderWeights,
        device: torch.device,
        num_blocks: int | None = None,
    ) -> None:
        self.limits = limits
        self._config = config
        self._weights = weights
        self._device = device
        num_blocks = num_blocks or limits.max_batch_size * num_blocks_for(limits.max_seq_len)
        assert num_blocks >= num_blocks_for(limits.max_seq_len), "no room for the longest request"
        self._cache = PagedKVCache(config, num_blocks, weights.kv_scales, device)
        self._scheduler = Scheduler(limits, num_blocks)
        self._next_id = 0

    @classmethod
    def load(cls, engine: EngineDir, device: torch.device) -> TorchDecoderExecutor:
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
        if needed_bytes > memory_bytes:
            raise UserError(
                f"the KV cache of {engine.directory} takes {plan.kv_cache_bytes / 1e9:.1f} GB and "
                f"its weights {weight_bytes / 1e9:.1f} GB of {device}'s {memory_bytes / 1e9:.1f} "
                "GB; build it with a smaller --max_batch_size or --max_seq_len"
            )
        weights = load_weights(engine.directory / "llm", config, device)
        return cls(config, engine.limits, weights, device)

    @property
    def scheduler(self) -> Scheduler:
        """For metrics and tests."""
        return self._scheduler

    def submit(self, request: DecoderRequest) -> int:
        decoder = self._config.decoder
        check_request(request, self.limits, decoder.vocab_size, decoder.hidden_size)
        room = self.limits.max_seq_len - len(request.token_ids)
        max_num_tokens = len(request.token_ids) + min(request.max_new_tokens, room)
        keys = [] if request.prompt_table is None else image_keys(request, decoder.vocab_size)
        self._next_id += 1
        self._scheduler.add(
            Sequence(self._next_id, request, max_num_tokens, list(request.token_ids), keys)
        )
        return self._next_id

    def cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)

    def run_worker(self) -> None:
        raise AssertionError("one rank runs this executor")

    def close(self) -> None:
        """Nothing is held beyond memory."""

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        while sequences := self._scheduler.schedule():
            drawing = [sequence for sequence in sequences if sequence.is_last_chunk]
            logits = self._forward(sequences)
            self._scheduler.advance(sequences)
            if drawing:  # otherwise all were chunks of prompts that go on
                return [self._draw(*pair) for pair in zip(drawing, logits, strict=True)]
        return []

    def _draw(self, sequence: Sequence, logits: torch.Tensor) -> StepOutput:
        """Draws one sequence's token and ends it where it must end."""
        request = sequence.request
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

    def _forward(self, sequences: list[Sequence]) -> torch.Tensor:
        """Runs every sequence's pending tokens; float32 logits of those with their last chunk."""
        weights, decoder = self._weights, self._config.decoder
        counts = [len(sequence.pending) for sequence in sequences]
        starts = [sequence.num_cached for sequence in sequences]
        hidden = torch.cat([self._embed(sequence) for sequence in sequences])  # [T, hidden_size]
        positions = torch.cat(
            [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        ).to(self._device)
        slots = torch.cat(
            [
                self._cache.slots(sequence.blocks, start, count)
                for sequence, start, count in zip(sequences, starts, counts, strict=True)
            ]
        )
        cos, sin = rope_tables(positions, decoder.head_dim, decoder.rope_theta)
        attend_in = self._attention(sequences, counts, slots)
        for index, layer in enumerate(weights.layers):
            hidden = layer(hidden, cos, sin, attend_in(index))
        ends = torch.tensor(counts).cumsum(0) - 1
        last_rows = ends[torch.tensor([sequence.is_last_chunk for sequence in sequences])]
        hidden = hidden[last_rows.to(self._device)]
        normed = rms_norm(hidden, weights.final_norm, decoder.rms_norm_eps)
        logits: torch.Tensor = weights.lm_head(normed)
        return logits

    def _embed(self, sequence: Sequence) -> torch.Tensor:
        token_ids = torch.tensor(sequence.pending, device=self._device)
        embedding, table = self._weights.embedding, sequence.request.prompt_table
        if sequence.num_cached >= sequence.num_prompt_tokens:
            table = None  # only the prompt holds virtual tokens
        table = None if table is None else table.to(self._device)
        return embed(token_ids, embedding, table, embedding.dtype)

    def _attention(
        self, sequences: list[Sequence], counts: list[int], slots: torch.Tensor
    ) -> Callable[[int], Attend]:
        """For each layer, attention of every sequence over its own blocks of the cache."""

        def attend_in(layer: int) -> Attend:
            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                self._cache.write(layer, slots, k, v)
                outputs = []
                for sequence, rows in zip(sequences, q.split(counts), strict=True):
                    first = sequence.num_cached
                    cached = self._cache.read(layer, sequence.blocks, first + len(rows))
                    outputs.append(causal_attention(rows, *cached, first))
                return torch.cat(outputs).to(q.dtype)

            return attend

        return attend_in
