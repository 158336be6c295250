"""`DecoderExecutor` over the model `tensorrt_llm` of the same Triton server: TensorRT-LLM's C++
backend, which batches by itself and whose tensors these are."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from frontends.triton.models.channel import (
    Channel,
    RemoteError,
    remote_error,
    to_arrays,
    to_request,
)
from frontends.triton.tensorrt_llm import new_tokens, request_tensors
from nvlm.model.dtypes import TORCH_DTYPES
from runtime.decoder.executor import (
    DecoderRequest,
    StepOutput,
    TokenLogprobs,
    check_request,
)
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import FinishReason


class RemoteDecoderExecutor:
    """A thread for each request in flight reads its responses; `step` waits for the next of any."""

    def __init__(self, engine: EngineDir, url: str) -> None:
        self.limits = engine.limits
        self._config = engine.checkpoint_config
        self._ids = itertools.count(1)
        self._open: set[int] = set()
        self._outputs: SimpleQueue[StepOutput] = SimpleQueue()
        self._next: StepOutput | None = None
        self._channel = Channel(url)
        self._lock = threading.Lock()
        self._calls: dict[int, Any] = {}
        # Twice as many, because the thread of a cancelled request ends a moment later.
        self._threads = ThreadPoolExecutor(2 * self.limits.max_batch_size)

    def submit(self, request: DecoderRequest) -> int:
        decoder = self._config.decoder
        check_request(request, self.limits, decoder.vocab_size, decoder.hidden_size)
        request_id = next(self._ids)
        self._open.add(request_id)
        self._threads.submit(self._run, request_id, request)
        return request_id

    def step(self) -> list[StepOutput]:
        """The next token of each request that has one; waits while none has."""
        outputs: dict[int, StepOutput] = {}
        while self._open and not (outputs and self._next is None and self._outputs.empty()):
            output = self._next or self._outputs.get()
            self._next = None
            if output.request_id in outputs:
                self._next = output  # its second token is for the next step
                break
            if output.request_id in self._open:
                outputs[output.request_id] = output
            if output.finish_reason is not None or output.error is not None:
                self._open.discard(output.request_id)
        return list(outputs.values())

    def cancel(self, request_id: int) -> None:
        """The backend sees that nobody waits for the answer any more."""
        if request_id in self._open:
            self._open.discard(request_id)
            with self._lock:
                call = self._calls.get(request_id)
            if call is not None:
                call.cancel()

    def close(self) -> None:
        for request_id in list(self._open):
            self.cancel(request_id)
        self._threads.shutdown()
        self._channel.close()

    def _run(self, request_id: int, request: DecoderRequest) -> None:
        try:
            for output in self._answers(request_id, request):
                self._outputs.put(output)
        except Exception as error:
            self._outputs.put(StepOutput(request_id, None, None, error=remote_error(error)))
        finally:
            with self._lock:
                self._calls.pop(request_id, None)

    def _answers(self, request_id: int, request: DecoderRequest) -> Iterator[StepOutput]:
        """One output per token; the backend leaves the end token out of its last response."""
        room = self.limits.max_seq_len - len(request.token_ids)
        num_left = min(request.max_new_tokens, room)
        dtype = TORCH_DTYPES[self._config.dtype]
        tensors = request_tensors(request, num_left, self._config.decoder.vocab_size, dtype)
        outputs: tuple[str, ...] = ("output_ids", "sequence_length")
        if request.sampling.logprobs:
            outputs += ("output_log_probs",)
        asked = to_request("tensorrt_llm", tensors, outputs, str(request_id))
        call = self._channel.stub.ModelStreamInfer(iter([asked]))
        with self._lock:
            self._calls[request_id] = call
        if request_id not in self._open:  # cancelled before there was anything to cancel
            call.cancel()
        for token_id, logprobs in _tokens(call):
            if token_id in request.stop_ids:
                call.cancel()
                break
            num_left -= 1
            reason: FinishReason | None = "length" if num_left == 0 else None
            yield StepOutput(request_id, token_id, reason, logprobs=logprobs)
        if num_left:
            yield StepOutput(request_id, None, "stop")


def _tokens(call: Any) -> Iterator[tuple[int, TokenLogprobs | None]]:
    for answer in call:
        if answer.error_message:
            raise RemoteError(answer.error_message)
        outputs = to_arrays(answer.infer_response)
        if outputs:  # the last response may hold nothing
            yield from new_tokens(outputs)
