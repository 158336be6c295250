"""The embedded decoder: a TensorRT-LLM checkpoint run by PyTorch, on any device.

Scheduling and sampling are here; what computes is a `DecoderModel`.
"""

from __future__ import annotations

import torch

from nvlm.checkpoint_config import CheckpointConfig
from nvlm.errors import UserError
from nvlm.limits import EngineLimits
from nvlm.memory import total_memory_bytes
from nvlm.plan import plan_engine
from runtime.decoder.executor import DecoderRequest, StepOutput, check_request
from runtime.decoder.parallel_model import ParallelModel
from runtime.decoder.plain_model import PlainModel
from runtime.decoder.scheduler import Scheduler, Sequence, max_num_blocks
from runtime.decoder.step import DecoderModel, SequenceStep
from runtime.decoder.torch_weights import load_weights
from runtime.engine_dir import EngineDir
from runtime.process_group import ProcessGroup
from runtime.sampling import sample


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
        config, limits = engine.checkpoint_config, engine.limits
        _require_fit(engine, device, 1 if group is None else group.job.world.local_size)
        directory = engine.directory / "llm"
        num_blocks = max_num_blocks(limits)
        if group is None:
            weights = load_weights(directory, config, device)
            return cls(config, limits, PlainModel(config, weights, num_blocks, device), num_blocks)
        weights = load_weights(directory, config, device, group.rank, group.all_reduce)
        own = PlainModel(config, weights, num_blocks, device)
        model = ParallelModel(own, group, weights.embedding, config.decoder.vocab_size)
        return cls(config, limits, model, num_blocks, group)

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
        logits = self._model.forward([SequenceStep.of(sequence) for sequence in sequences])
        return [self._advance(*pair) for pair in zip(sequences, logits, strict=True)]

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


def _require_fit(engine: EngineDir, device: torch.device, num_ranks: int) -> None:
    """num_ranks: those of this machine, which share its memory where the device is a CPU."""
    memory_bytes = total_memory_bytes(device)
    plan = plan_engine(
        engine.checkpoint_config,
        engine.vision.vision,
        engine.vision_precision,
        engine.limits,
        device,
        memory_bytes,
    )
    weight_bytes = plan.decoder_weight_bytes
    if device.type == "cpu":  # it maps its weights and can page them; the cache has to be there
        weight_bytes, memory_bytes = 0, memory_bytes // num_ranks
    if plan.kv_cache_bytes + weight_bytes > memory_bytes:
        raise UserError(
            f"the KV cache of {engine.directory} takes {plan.kv_cache_bytes / 1e9:.1f} GB and "
            f"its weights {weight_bytes / 1e9:.1f} GB of {device}'s {memory_bytes / 1e9:.1f} "
            "GB; build it with a smaller --max_batch_size or --max_seq_len"
        )
