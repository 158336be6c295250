"""The executors' interfaces over other models of the same Triton server, by its gRPC endpoint.

`vision` encodes tiles; `tensorrt_llm` is TensorRT-LLM's C++ backend, whose tensors these are. The
Python backend's own calls (business logic scripting) corrupt memory when several threads make them
(docs/decisions.md).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from model_repository.tensorrt_llm import new_token_ids, request_tensors
from nvlm.dtypes import TORCH_DTYPES
from runtime.decoder.executor import DecoderRequest, FinishReason, StepOutput, check_request
from runtime.engine_dir import EngineDir

_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_DATATYPES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


class RemoteError(Exception):
    """What another model of the server answered instead of tensors."""


class RemoteVisionExecutor:
    """`VisionExecutor` over the model `vision`."""

    def __init__(self, engine: EngineDir, url: str) -> None:
        self.max_num_tiles = engine.vision.tiling.max_tiles_per_image
        self._dtype = TORCH_DTYPES[engine.checkpoint_config.dtype]
        self._channel = grpc.insecure_channel(url, _UNLIMITED)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        try:
            response = self._stub.ModelInfer(_request("vision", "", {"tiles": tiles}))
        except grpc.RpcError as error:
            raise RemoteError(error.details()) from None
        raw = bytearray(response.raw_output_contents[0])
        return torch.frombuffer(raw, dtype=self._dtype).view(*response.outputs[0].shape)

    def close(self) -> None:
        self._channel.close()


class RemoteDecoderExecutor:
    """`DecoderExecutor` over the model `tensorrt_llm`, which batches by itself.

    A thread for each request under way reads its responses; `step` waits for the next of any.
    """

    def __init__(self, engine: EngineDir, url: str) -> None:
        self.limits = engine.limits
        self._config = engine.checkpoint_config
        self._ids = itertools.count(1)
        self._open: set[int] = set()
        self._outputs: SimpleQueue[StepOutput] = SimpleQueue()
        self._next: StepOutput | None = None
        self._channel = grpc.insecure_channel(url, _UNLIMITED)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
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

    def run_worker(self) -> None:
        raise AssertionError("the backend's own ranks do the work")

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
            told = RemoteError(error.details()) if isinstance(error, grpc.RpcError) else error
            self._outputs.put(StepOutput(request_id, None, None, error=told))
        finally:
            with self._lock:
                self._calls.pop(request_id, None)

    def _answers(self, request_id: int, request: DecoderRequest) -> Iterator[StepOutput]:
        """One output per token; the backend leaves the end token out of its last response."""
        room = self.limits.max_seq_len - len(request.token_ids)
        num_left = min(request.max_new_tokens, room)
        dtype = TORCH_DTYPES[self._config.dtype]
        tensors = request_tensors(request, num_left, self._config.decoder.vocab_size, dtype)
        call = self._stub.ModelStreamInfer(
            iter([_request("tensorrt_llm", str(request_id), tensors)])
        )
        with self._lock:
            self._calls[request_id] = call
        if request_id not in self._open:  # cancelled before there was anything to cancel
            call.cancel()
        for token_id in _token_ids(call):
            if token_id in request.stop_ids:
                call.cancel()
                break
            num_left -= 1
            reason: FinishReason | None = "length" if num_left == 0 else None
            yield StepOutput(request_id, token_id, reason)
        if num_left:
            yield StepOutput(request_id, None, "stop")


def _token_ids(call: Any) -> Iterator[int]:
    for answer in call:
        if answer.error_message:
            raise RemoteError(answer.error_message)
        outputs = _outputs(answer.infer_response)
        if outputs:  # the last response may hold nothing
            yield from new_token_ids(outputs)


def _request(model: str, request_id: str, tensors: dict[str, Any]) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            datatype = _DATATYPES[value.dtype]
            raw = value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        else:
            datatype, raw = np_to_triton_dtype(value.dtype), value.tobytes()
        request.inputs.add(name=name, datatype=datatype, shape=value.shape)
        request.raw_input_contents.append(raw)
    if model == "tensorrt_llm":
        for name in ("output_ids", "sequence_length"):
            request.outputs.add(name=name)
    return request


def _outputs(response: Any) -> dict[str, NDArray[Any]]:
    return {
        output.name: np.frombuffer(raw, triton_to_np_dtype(output.datatype)).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
