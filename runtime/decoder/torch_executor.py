"""The embedded decoder: a TensorRT-LLM checkpoint run by PyTorch, on any device.

Scheduling and sampling are here; what computes is a `DecoderModel`: on a Hopper GPU the fast path
(hopper_model.py), everywhere else the plain form (plain_model.py).
"""

from __future__ import annotations

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from runtime.decoder.block_allocator import num_blocks_for
from runtime.decoder.executor import (
    DecoderCounts,
    DecoderOptions,
    DecoderRequest,
    StepOutput,
    TokenLogprobs,
    check_request,
)
from runtime.decoder.guidance import TokenMasks, apply_masks
from runtime.decoder.image_ids import image_keys
from runtime.decoder.in_flight import InFlightStep, UndrawnStep
from runtime.decoder.logits_processors import LogitsProcessors, changes_logits
from runtime.decoder.logprobs import LogprobRows, take_prompt_logprobs
from runtime.decoder.models.open_model import OpenedModel, open_model
from runtime.decoder.models.step import AheadModel, DecoderModel, SequenceStep
from runtime.decoder.sampler import sample_rows
from runtime.decoder.scheduler import UNKNOWN_TOKEN, Scheduler, Sequence
from runtime.decoder.step_bound import StepBound
from runtime.decoder.step_times import measure_step_bound
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on
from runtime.requests.types import FinishReason


class TorchDecoderExecutor:
    """`DecoderExecutor` over one model, which schedules and samples. num_blocks: of the model's KV
    cache. bound: of the time of steps in which somebody decodes; None is none."""

    def __init__(
        self,
        config: CheckpointConfig,
        limits: EngineLimits,
        model: DecoderModel,
        num_blocks: int,
        bound: StepBound | None = None,
    ) -> None:
        assert num_blocks >= num_blocks_for(limits.max_seq_len), "no room for the longest request"
        self.limits = limits
        self._config = config
        self._model = model
        self._ahead = model if isinstance(model, AheadModel) else None
        self._num_blocks = num_blocks
        self._scheduler = Scheduler(limits, num_blocks, bound)
        self._processors: LogitsProcessors | None = None  # from the first request that needs them
        self._in_flight: InFlightStep | None = None
        self._masks: TokenMasks | None = None  # from the first guide on
        self._next_id = 0

    @classmethod
    def load(
        cls, engine: EngineDir, device: torch.device, options: DecoderOptions | None = None
    ) -> TorchDecoderExecutor:
        options = options or DecoderOptions()
        cache_fraction = options.kv_cache_free_gpu_memory_fraction
        opened = open_model(
            engine,
            device,
            cache_fraction=cache_fraction,
            answers_once=options.num_answers is not None,
        )
        executor = cls.over(engine, opened)
        with loading_on(device, engine):
            executor.bound_steps(options.step_bound_ms(device), device)
        return executor

    @classmethod
    def over(cls, engine: EngineDir, opened: OpenedModel) -> TorchDecoderExecutor:
        """An engine's executor over a model of its shape."""
        return cls(engine.checkpoint_config, engine.limits, opened.model, opened.num_blocks)

    def bound_steps(self, max_step_ms: float, device: torch.device) -> None:
        """Bounds the steps in which somebody decodes, by steps that it measures on the model's
        device; 0 is no bound. While no request is open; what the KV cache holds is forgotten."""
        assert self._scheduler.is_idle, "steps are measured where nobody waits for one"
        self.step()  # lands what was launched ahead for requests that have left since
        bound, limits = None, self.limits
        if max_step_ms > 0.0:
            num_blocks = self._num_blocks
            bound = measure_step_bound(self._model, limits, num_blocks, max_step_ms, device)
        self._scheduler = Scheduler(limits, self._num_blocks, bound)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, for metrics and tests."""
        return self._scheduler

    def counts(self) -> DecoderCounts:
        return self._scheduler.counts

    def submit(self, request: DecoderRequest) -> int:
        decoder = self._config.decoder
        check_request(request, self.limits, decoder.vocab_size, decoder.hidden_size)
        room = self.limits.max_seq_len - len(request.token_ids)
        max_num_tokens = len(request.token_ids) + min(request.max_new_tokens, room)
        keys = [] if request.prompt_table is None else image_keys(request, decoder.vocab_size)
        guide = request.compiled_guide
        assert (guide is None) == (request.guide is None), "guides come here compiled"
        matcher = None if guide is None else guide.start(request.stop_ids)
        self._next_id += 1
        sequence = Sequence(
            self._next_id, request, max_num_tokens, list(request.token_ids), keys, matcher
        )
        sequence.changes_logits = changes_logits(request)
        if request.same_prompt_as is not None:
            sequence.same_prompt = self._scheduler.find(request.same_prompt_as)
        self._scheduler.add(sequence)
        return self._next_id

    def cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)

    def close(self) -> None:
        self._model.close()

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Returns a step's tokens, and launches the step after it first where that needs no known
        tokens: the device computes while the host hands them out. Where a guide has to see those
        tokens, it launches the forward pass first, and draws when the masks are there."""
        while True:
            if self._in_flight is None:
                self._in_flight = self._launch()
            if self._in_flight is None:
                return []
            following = self._launch_ahead(self._in_flight)
            landing, self._in_flight = self._in_flight, None
            if isinstance(following, InFlightStep):
                self._in_flight = following
            outputs = self._land(landing)
            if isinstance(following, UndrawnStep):
                self._in_flight = self._draw_now(following)
            if outputs:
                return outputs

    def _launch(self) -> InFlightStep | None:
        """The next step that draws tokens, after chunks of unfinished prompts."""
        while sequences := self._scheduler.schedule():
            drawing = [sequence for sequence in sequences if sequence.is_last_chunk]
            logits = self._model.forward([SequenceStep.of(sequence) for sequence in sequences])
            if any(sequence.wants_prompt_logprobs for sequence in sequences):
                logits = take_prompt_logprobs(sequences, logits, self._config.decoder.vocab_size)
            in_flight = self._draw(drawing, logits) if drawing else None
            self._scheduler.advance(sequences)
            if in_flight is not None:
                return in_flight
        return None

    def _launch_ahead(self, in_flight: InFlightStep) -> InFlightStep | UndrawnStep | None:
        if self._ahead is None or len(in_flight.sequences) > self._ahead.max_rows_ahead:
            return None
        sequences = self._scheduler.schedule_ahead()
        if not sequences:
            return None
        steps = [SequenceStep.of(sequence) for sequence in sequences]
        unknown = [each for each in sequences if each.num_known < each.num_tokens]
        logits = self._ahead.forward_ahead(steps, in_flight.tokens_of(unknown))
        drawing = [sequence for sequence in sequences if sequence.is_last_chunk]
        if any(sequence.matcher is not None for sequence in drawing):
            chunks = [sequence for sequence in sequences if not sequence.is_last_chunk]
            return UndrawnStep(drawing, logits, chunks)
        following = self._draw(drawing, logits) if drawing else None
        self._scheduler.advance(sequences)
        return following

    def _draw_now(self, undrawn: UndrawnStep) -> InFlightStep | None:
        """Draws for those that the step before has not ended."""
        rows = [row for row, sequence in enumerate(undrawn.sequences) if not sequence.has_left]
        sequences = [undrawn.sequences[row] for row in rows]
        logits = undrawn.logits
        if 0 < len(rows) < len(undrawn.sequences):
            logits = logits[torch.tensor(rows).to(logits.device, non_blocking=True)]
        following = self._draw(sequences, logits) if sequences else None
        self._scheduler.advance([*sequences, *undrawn.chunks])
        return following

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> InFlightStep:
        """Draws every sequence's token, which stays unknown until it lands. What fails changes no
        sequence, so that the step can be taken again."""
        params = [sequence.request.sampling for sequence in sequences]
        steps = [sequence.num_generated for sequence in sequences]
        kept_logits = [
            logits[i].clone() if sequence.request.return_logits else None
            for i, sequence in enumerate(sequences)
        ]
        changed = logits
        has_settings = any(sequence.changes_logits for sequence in sequences)
        if has_settings:
            changed = self._processors_on(logits.device).apply(sequences, logits)
        changed = self._apply_guides(sequences, changed)
        token_ids = sample_rows(changed, params, steps)
        if has_settings:
            self._processors_on(logits.device).count(sequences, token_ids)
        in_flight = InFlightStep(sequences, kept_logits, token_ids)
        if rows := [row for row, each in enumerate(params) if each.logprobs]:
            in_flight.logprob_rows = rows
            num_top = max(params[row].top_logprobs for row in rows)
            wanted = torch.tensor(rows).to(logits.device, non_blocking=True)
            in_flight.logprobs = LogprobRows.of(logits[wanted], token_ids[wanted], num_top)
        for sequence in sequences:
            sequence.token_ids.append(UNKNOWN_TOKEN)
        return in_flight

    def _processors_on(self, device: torch.device) -> LogitsProcessors:
        if self._processors is None:
            vocab_size = self._config.decoder.vocab_size
            self._processors = LogitsProcessors(self.limits.max_batch_size, vocab_size, device)
        return self._processors

    def _apply_guides(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """Logits whose guided rows have what their guides allow, whatever settings did: a copy.
        All tokens of such rows are known."""
        guided = [row for row, each in enumerate(sequences) if each.matcher is not None]
        if not guided:
            return logits
        if self._masks is None:
            self._masks = TokenMasks(logits.shape[1], logits.device)
        matchers = [each.matcher for each in sequences if each.matcher is not None]
        return apply_masks(logits, guided, self._masks.fill(matchers))

    def _land(self, in_flight: InFlightStep) -> list[StepOutput]:
        """Waits for the tokens, and hands them to those who have not left meanwhile."""
        token_ids = in_flight.tolist()
        rows = zip(
            in_flight.sequences,
            token_ids,
            in_flight.logits,
            in_flight.logprobs_of_rows(),
            strict=True,
        )
        return [
            self._take(sequence, token_id, logits, logprobs)
            for sequence, token_id, logits, logprobs in rows
            if not sequence.has_left
        ]

    def _take(
        self,
        sequence: Sequence,
        token_id: int,
        logits: torch.Tensor | None,
        logprobs: TokenLogprobs | None,
    ) -> StepOutput:
        """Gives a sequence its token and ends it where it must end."""
        place, matcher = sequence.num_known, sequence.matcher
        is_stop = token_id in sequence.request.stop_ids
        if matcher is not None:
            if not is_stop and matcher.error is None:
                matcher.take(token_id)
            if matcher.error is not None:
                return self._give_up(sequence, matcher.error)
        reason: FinishReason | None = None
        given: int | None = token_id
        if is_stop:
            del sequence.token_ids[place:]
            given, reason, logprobs = None, "stop", None
        else:
            sequence.token_ids[place] = token_id
            if matcher is not None and matcher.is_complete:
                reason = "stop"
            elif place + 1 == sequence.max_num_tokens:
                reason = "length"
        if reason is not None:
            self._scheduler.finish(sequence)
        is_first = place == sequence.num_prompt_tokens
        return StepOutput(
            sequence.request_id,
            given,
            reason,
            logits,
            logprobs,
            prompt_logprobs=(sequence.prompt_logprobs or None) if is_first else None,
            num_reused_tokens=sequence.num_reused if is_first else None,
        )

    def _give_up(self, sequence: Sequence, why: str) -> StepOutput:
        """Ends a sequence whose guide can be followed no further."""
        del sequence.token_ids[sequence.num_known :]
        self._scheduler.finish(sequence)
        guide = sequence.request.guide
        assert guide is not None, "a sequence without a guide has no matcher"
        error = UserError(
            f"{guide.name} could be followed no further after {sequence.num_generated} tokens "
            f"({why}); give a simpler one"
        )
        return StepOutput(sequence.request_id, None, None, error=error)
