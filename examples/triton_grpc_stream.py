"""Asks a Triton server about a picture over gRPC and prints the answer as it comes.

    python examples/triton_grpc_stream.py --image examples/scan_1642.png --prompt "Read the number."

Needs only tritonclient[grpc] and numpy.
"""

from __future__ import annotations

import argparse
import queue
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient


def tensor(name: str, values: object, dtype: object, triton_type: str) -> grpcclient.InferInput:
    """One input; the first dimension is the batch, which is 1."""
    array = np.array([values], dtype=dtype)
    return grpcclient.InferInput(name, array.shape, triton_type).set_data_from_numpy(array)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--image", type=Path, nargs="*", default=[])
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_tokens", type=int, default=64)
    arguments = parser.parse_args()

    inputs = [
        tensor("text_input", [arguments.prompt.encode()], np.object_, "BYTES"),
        tensor("max_tokens", [arguments.max_tokens], np.int32, "INT32"),
        tensor("stream", [True], np.bool_, "BOOL"),
    ]
    if arguments.image:
        files = [path.read_bytes() for path in arguments.image]
        inputs.append(tensor("image_bytes", files, np.object_, "BYTES"))

    answers: queue.Queue = queue.Queue()
    with grpcclient.InferenceServerClient(arguments.url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("nvlm", inputs, enable_empty_final_response=True)
        while True:
            result, error = answers.get()
            if error is not None:
                raise SystemExit(f"error: {error.message()}")
            response = result.get_response()
            if response.outputs:
                print(result.as_numpy("text_output")[0].decode(), end="", flush=True)
            if response.parameters["triton_final_response"].bool_param:
                break
    print()


if __name__ == "__main__":
    main()
