"""The embedded decoder: a TensorRT-LLM checkpoint run by PyTorch, on any device.

Scheduling and sampling are here; what computes is a `DecoderModel`: on a Hopper GPU the fast path
(hopper_model.py), everywhere else the plain form (plain_model.py).
"""

from __future__ import annotations

import torch

from nvlm.checkpoint_config import CheckpointConfig
from nvlm.limits import EngineLimits
from runtime.decoder.block_allocator import num_blocks_for
from runtime.decoder.executor import DecoderRequest, StepOutput, check_request
from runtime.decoder.image_ids import image_keys
from runtime.decoder.open_model import OpenedModel, open_model
from runtime.decoder.scheduler import Scheduler, Sequence
from runtime.decoder.step import DecoderModel, SequenceStep
from runtime.engine_dir import EngineDir
from runtime.process_group import ProcessGroup
from runtime.sampling import sample_rows


class TorchDecoderExecutor:
    """`DecoderExecutor` on one device, or on a rank of a tensor parallel `group`: its leader alone
    schedules and samples. num_blocks: of the model's KV cache."""

    def __init__(
        self,
        config: CheckpointConfig,
        limits: EngineLimits,
        model: DecoderModel,
        num_blocks: int,
        group: ProcessGroup | None = None,
    ) -> None:
        assert num_blocks >= num_blocks_for(limits.max_seq_len), "no room for the longest request"
        self.limits = limits
        self._config = config
        self._model = model
        self._scheduler = Scheduler(limits, num_blocks)
        self._next_id = 0
        self._group = group

    @classmethod
    def load(
        cls, engine: EngineDir, device: torch.device, group: ProcessGroup | None = None
    ) -> TorchDecoderExecutor:
        return cls.over(engine, open_model(engine, device, group=group), group)

    @classmethod
    def over(
        cls, engine: EngineDir, opened: OpenedModel, group: ProcessGroup | None = None
    ) -> TorchDecoderExecutor:
        """An engine's executor over a model of its shape."""
        config, limits = engine.checkpoint_config, engine.limits
        return cls(config, limits, opened.model, opened.num_blocks, group)

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

    def prepare_thread(self) -> None:
        self._model.prepare_thread(self.limits.max_num_tokens)

    def run_worker(self) -> None:
        assert self._group is not None, "one rank runs this executor"
        self._group.follow()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        while sequences := self._scheduler.schedule():
            drawing = [sequence for sequence in sequences if sequence.is_last_chunk]
            logits = self._model.forward([SequenceStep.of(sequence) for sequence in sequences])
            self._scheduler.advance(sequences)
            if drawing:  # otherwise all were chunks of prompts that go on
                return self._draw(drawing, logits)
        return []

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> list[StepOutput]:
        """Draws every sequence's token, for which a GPU is waited for once."""
        params = [sequence.request.sampling for sequence in sequences]
        steps = [sequence.num_generated for sequence in sequences]
        token_ids = sample_rows(logits, params, steps).tolist()
        return [
            self._take(sequence, token_id, logits[i] if sequence.request.return_logits else None)
            for i, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True))
        ]

    def _take(self, sequence: Sequence, token_id: int, logits: torch.Tensor | None) -> StepOutput:
        """Gives a sequence its token and ends it where it must end."""
        request = sequence.request
        kept_logits = None if logits is None else logits.clone()
        if token_id in request.stop_ids:
            self._scheduler.finish(sequence)
            return StepOutput(sequence.request_id, None, "stop", kept_logits)
        sequence.token_ids.append(token_id)
        is_full = len(sequence.token_ids) == sequence.max_num_tokens
        if is_full:
            self._scheduler.finish(sequence)
        return StepOutput(sequence.request_id, token_id, "length" if is_full else None, kept_logits)
