"""The executors' interfaces over other models of the same Triton server (business logic scripting).

`vision` encodes tiles; `tensorrt_llm` is TensorRT-LLM's C++ backend, whose tensors these are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from model_repository.tensorrt_llm import new_token_ids, request_tensors, stop_tensors
from nvlm.dtypes import TORCH_DTYPES
from runtime.decoder.executor import DecoderRequest, FinishReason, StepOutput, check_request
from runtime.engine_dir import EngineDir


class BlsError(Exception):
    """What another model of the server answered instead of tensors."""


class BlsVisionExecutor:
    """`VisionExecutor` over the model `vision`."""

    def __init__(self, engine: EngineDir) -> None:
        self.max_num_tiles = engine.vision.tiling.max_tiles_per_image

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        request = pb_utils.InferenceRequest(
            model_name="vision",
            requested_output_names=["image_embeddings"],
            inputs=[pb_utils.Tensor.from_dlpack("tiles", tiles.contiguous())],
        )
        response = _checked(request.exec())
        output = pb_utils.get_output_tensor_by_name(response, "image_embeddings")
        return from_dlpack(output.to_dlpack()).clone()  # it outlives the response

    def close(self) -> None:
        """The model is Triton's to unload."""


class BlsDecoderExecutor:
    """`DecoderExecutor` over the model `tensorrt_llm`, which batches by itself.

    A thread for each request under way reads its responses; `step` waits for the next of any.
    """

    def __init__(self, engine: EngineDir) -> None:
        self.limits = engine.limits
        self._config = engine.checkpoint_config
        self._ids = itertools.count(1)
        self._open: set[int] = set()
        self._outputs: SimpleQueue[StepOutput] = SimpleQueue()
        self._next: StepOutput | None = None
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

    def run_worker(self) -> None:
        raise AssertionError("the backend's own ranks do the work")

    def cancel(self, request_id: int) -> None:
        if request_id in self._open:
            self._open.discard(request_id)
            self._threads.submit(self._stop, request_id)

    def close(self) -> None:
        for request_id in list(self._open):
            self.cancel(request_id)
        self._threads.shutdown()

    def _run(self, request_id: int, request: DecoderRequest) -> None:
        try:
            for output in self._answers(request_id, request):
                self._outputs.put(output)
        except Exception as error:
            self._outputs.put(StepOutput(request_id, None, None, error=error))

    def _answers(self, request_id: int, request: DecoderRequest) -> Iterator[StepOutput]:
        """One output per token; the backend leaves the end token out of its last response."""
        room = self.limits.max_seq_len - len(request.token_ids)
        num_left = min(request.max_new_tokens, room)
        dtype = TORCH_DTYPES[self._config.dtype]
        tensors = request_tensors(request, num_left, self._config.decoder.vocab_size, dtype)
        for token_id in self._token_ids(request_id, tensors):
            if token_id in request.stop_ids:
                self._stop(request_id)
                break
            num_left -= 1
            reason: FinishReason | None = "length" if num_left == 0 else None
            yield StepOutput(request_id, token_id, reason)
        if num_left:
            yield StepOutput(request_id, None, "stop")

    def _token_ids(self, request_id: int, tensors: dict[str, Any]) -> Iterator[int]:
        for response in _request(request_id, tensors).exec(decoupled=True):
            outputs = {t.name(): t.as_numpy() for t in _checked(response).output_tensors()}
            if outputs:  # the last response may hold nothing
                yield from new_token_ids(outputs)

    def _stop(self, request_id: int) -> None:
        for _ in _request(request_id, stop_tensors()).exec(decoupled=True):
            pass  # an error means that it has ended already


def _request(request_id: int, tensors: dict[str, Any]) -> Any:
    return pb_utils.InferenceRequest(
        model_name="tensorrt_llm",
        request_id=str(request_id),
        requested_output_names=["output_ids", "sequence_length"],
        inputs=[
            pb_utils.Tensor.from_dlpack(name, value)
            if isinstance(value, torch.Tensor)
            else pb_utils.Tensor(name, value)
            for name, value in tensors.items()
        ],
    )


def _checked(response: Any) -> Any:
    if response.has_error():
        raise BlsError(response.error().message())
    return response
