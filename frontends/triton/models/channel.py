"""What one model of a Triton server needs to ask another: tensors out, tensors back, over gRPC.

The Python backend's own calls (business logic scripting) corrupt memory when several threads make
them: decision 75 (docs/decisions/triton.md).
"""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

# The server is this machine's, whatever http_proxy says.
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
_DATATYPES = {
    torch.uint8: "UINT8",
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
}


class RemoteError(Exception):
    """What another model of the server answered instead of tensors."""


class Channel:
    """A connection that any number of threads may use."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url, _OPTIONS)
        self.stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()


def remote_error(error: Exception) -> Exception:
    """gRPC's exceptions carry more than their sentence."""
    return RemoteError(error.details()) if isinstance(error, grpc.RpcError) else error


def to_request(
    model: str,
    tensors: dict[str, NDArray[Any] | torch.Tensor],
    outputs: tuple[str, ...],
    request_id: str = "",
) -> Any:
    """A `ModelInferRequest` for the `outputs`."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            datatype = _DATATYPES[value.dtype]
            raw = value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        elif value.dtype == np.object_:
            datatype, raw = "BYTES", serialize_byte_tensor(value).item()
        else:
            datatype, raw = np_to_triton_dtype(value.dtype), value.tobytes()
        request.inputs.add(name=name, datatype=datatype, shape=value.shape)
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def to_arrays(response: Any) -> dict[str, NDArray[Any]]:
    """The tensors of a `ModelInferResponse` that numpy has types for."""
    return {
        output.name: np.frombuffer(raw, triton_to_np_dtype(output.datatype)).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def to_tensor(response: Any, dtype: torch.dtype) -> torch.Tensor:
    """The one tensor of a `ModelInferResponse`."""
    (output,), (raw,) = response.outputs, response.raw_output_contents
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(*output.shape)
