"""What runs the decoder, seen from outside: token ids and prompt tables in, token ids out.

No string and no image crosses this interface. Implementations share one contract test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, Protocol, runtime_checkable

import torch

from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError, shown
from runtime.decoder.guidance import CompiledGuide
from runtime.engine.engine_dir import EngineDir
from runtime.requests.guide import Guide
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import FinishReason


@dataclass(frozen=True, slots=True)
class DecoderRequest:
    """One prompt to continue. The strings of `sampling` mean nothing here, nor does its n."""

    # Ids from vocab_size on are rows of the prompt table: vocab_size + r is row r.
    token_ids: list[int]
    max_new_tokens: int  # cut to what max_seq_len leaves
    # [num_virtual_tokens, hidden_size], any float dtype; cast to the engine's.
    prompt_table: torch.Tensor | None = None
    cache_keys: tuple[bytes, ...] = ()  # one an image, equal exactly for equal pixels
    rows_per_image: tuple[int, ...] = ()  # rows of each image in the table
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer and are not part of it
    sampling: SamplingParams = field(default_factory=SamplingParams)  # a seed that is missing is 0
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that never follow one another
    # Id of a request with the same prompt, which waits in front or runs. This one shares its blocks
    # and joins once they are computed.
    same_prompt_as: int | None = None
    return_logits: bool = False  # give the model's logits of each token
    guide: Guide | None = None  # what the answer must match
    # For an executor that does not compile guides itself.
    compiled_guide: CompiledGuide | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log probability (natural logarithm), and those of the likeliest in its place."""

    logprob: float  # of the token itself
    top: tuple[tuple[int, float], ...] = ()  # (token id, log probability), likeliest first


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one request.

    An answer to which its guide lets nothing be added stops with its last token.
    """

    request_id: int  # as `submit` returned it
    token_id: int | None  # None: a stop token came
    finish_reason: FinishReason | None  # None while the request runs
    # [vocab_size] float32 of the model, if asked for; settings and guides change copies.
    logits: torch.Tensor | None = None
    logprobs: TokenLogprobs | None = None  # of the token, if asked for
    # With the first token: one for each of the prompt's, None for the first and for rows of the
    # prompt table.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    # With the first token: those of the prompt that earlier requests had computed. None: the
    # executor does not know.
    num_reused_tokens: int | None = None
    error: Exception | None = None  # why the executor gave up this request, and no other


SERVICE_STEP_MS = 33.0
"""The default --max_step_ms of a server on a GPU: decision 144 (docs/decisions/decoder.md)."""


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """How an engine is loaded. Raises `UserError` for a negative or endless `max_step_ms`."""

    # Of a GPU's memory that is free after loading. None: the decoder's own choice.
    kv_cache_free_gpu_memory_fraction: float | None = None
    gather_logits: bool = False  # requests will ask for logits
    # How long a step may take in which requests decode and prompts are computed (`StepBound`), from
    # which the slices of vision follow too. 0: no bound; None: what suits a service on the device.
    max_step_ms: float | None = 0.0
    # That are asked for in all, of one request. Then what only others would use is neither made nor
    # tried at load. None: any number, of any requests.
    num_answers: int | None = None

    def __post_init__(self) -> None:
        if self.max_step_ms is not None and not 0.0 <= self.max_step_ms < math.inf:
            raise UserError(
                f"max_step_ms is {self.max_step_ms:g}, expected milliseconds from 0; give 0 for no "
                "bound"
            )

    def step_bound_ms(self, device: torch.device) -> float:
        """`max_step_ms` on a device; 0 is no bound. A CPU's service has none, since its steps are
        as long as their tokens are many."""
        if self.max_step_ms is None:
            return SERVICE_STEP_MS if device.type == "cuda" else 0.0
        return self.max_step_ms


class DecoderExecutor(Protocol):
    limits: EngineLimits

    def submit(self, request: DecoderRequest) -> int:
        """Queues a request and returns its id. Raises `UserError` for one that can never run."""
        ...

    def step(self) -> list[StepOutput]:
        """Advances every running request by one token, letting waiting ones join first, or after
        the next step where that one is in flight already.

        Returns an empty list when nothing is left to do.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """Ends a request, waiting or running; it appears in no later step. Unknown ids are fine."""
        ...

    def close(self) -> None: ...


WaitCause = Literal["place", "blocks", "equal_prompt", "step"]
"""What the decoder's first waiting request waits for: a place in the batch, KV blocks, blocks that
a request with the same prompt still computes, or room in the step."""


@dataclass(frozen=True, slots=True)
class DecoderCounts:
    """What a decoder has done, and who waits."""

    usage: float = 0.0  # share of the KV blocks that requests hold, 0 to 1
    num_preemptions: int = 0  # times that a request gave up its blocks
    num_queried_tokens: int = 0  # tokens of prompts that looked for known blocks
    num_reused_tokens: int = 0  # of those, tokens that were found
    num_tokens_beside: int = 0  # prompt tokens computed in steps in which another request decoded
    num_tokens_alone: int = 0  # prompt tokens computed in all other steps
    # Requests by what the first of them waits for.
    waiting: dict[WaitCause, int] = field(default_factory=dict)

    def since(self, before: DecoderCounts) -> DecoderCounts:
        """What was counted after `before`; usage and who waits are those of now."""
        return replace(
            self,
            num_preemptions=self.num_preemptions - before.num_preemptions,
            num_queried_tokens=self.num_queried_tokens - before.num_queried_tokens,
            num_reused_tokens=self.num_reused_tokens - before.num_reused_tokens,
            num_tokens_beside=self.num_tokens_beside - before.num_tokens_beside,
            num_tokens_alone=self.num_tokens_alone - before.num_tokens_alone,
        )


@runtime_checkable
class CountsSteps(Protocol):
    """An executor that says what its steps did. Any thread may ask."""

    def counts(self) -> DecoderCounts: ...


def create_decoder_executor(
    engine: EngineDir, device: torch.device, options: DecoderOptions | None = None
) -> DecoderExecutor:
    """The executor, on one rank or TensorRT-LLM's, for the target the engine was built for."""
    if engine.decoder_target == "tensorrt_llm":
        from runtime.decoder.tensorrt_llm_executor import TensorrtLlmDecoderExecutor

        options = options or DecoderOptions()
        require_own_scheduler(engine, options.max_step_ms)
        return TensorrtLlmDecoderExecutor(engine, device, options)
    if engine.decoder_target == "torch":
        from runtime.decoder.torch_executor import TorchDecoderExecutor

        return TorchDecoderExecutor.load(engine, device, options)
    raise UserError(
        f"{engine.directory} was built for decoder {shown(engine.decoder_target)}, which this "
        "version does not run; build it again with --decoder torch or tensorrt_llm"
    )


def require_own_scheduler(engine: EngineDir, max_step_ms: float | None) -> None:
    """Refuses a bound that TensorRT-LLM, which schedules by itself, would not keep."""
    if max_step_ms and engine.decoder_target == "tensorrt_llm":
        raise UserError(
            f"--max_step_ms {max_step_ms:g} needs decoder torch, and {engine.directory} was built "
            "for tensorrt_llm, which schedules by itself; leave it out, or build with --decoder "
            "torch"
        )


def check_request(
    request: DecoderRequest, limits: EngineLimits, vocab_size: int, hidden_size: int
) -> None:
    """Refuses what no executor could run, in one sentence."""
    table = request.prompt_table
    if table is not None and (table.ndim != 2 or table.shape[1] != hidden_size):
        raise UserError(
            f"the prompt table has shape {list(table.shape)}, expected [rows, {hidden_size}]"
        )
    num_tokens = len(request.token_ids)
    if num_tokens == 0:
        raise UserError("the prompt has no tokens")
    check_prompt_length(num_tokens, limits)
    check_max_new_tokens(request.max_new_tokens)
    num_rows = 0 if table is None else len(table)
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size + num_rows:
        raise UserError(
            f"token ids run from {min(request.token_ids)} to {max(request.token_ids)}, expected 0 "
            f"to {vocab_size + num_rows - 1} ({vocab_size} words, {num_rows} prompt-table rows)"
        )


def check_prompt_length(num_tokens: int, limits: EngineLimits) -> None:
    if num_tokens > limits.max_input_len:
        raise UserError(
            f"the prompt has {num_tokens} tokens, the engine takes {limits.max_input_len}; shorten "
            "it or build the engine with a larger --max_input_len"
        )


def check_max_new_tokens(max_new_tokens: object) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral):
        raise UserError(
            f"max_new_tokens is {shown(max_new_tokens)}, expected 1 or more, a whole number"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
