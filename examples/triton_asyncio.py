"""Asks a Triton server several questions at once with asyncio; answers are printed as they end.

    python examples/triton_asyncio.py --prompt "What is 1 plus 1?" "What is 2 plus 3?"

Needs only tritonclient[grpc] and numpy.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpcclient


async def requests(prompt: str, max_tokens: int) -> AsyncIterator[dict[str, Any]]:
    """The requests of one stream: here a single one."""
    text = grpcclient.InferInput("text_input", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[prompt.encode()]], np.object_))
    limit = grpcclient.InferInput("max_tokens", [1, 1], "INT32")
    limit.set_data_from_numpy(np.array([[max_tokens]], np.int32))
    yield {"model_name": "nvlm", "inputs": [text, limit]}


async def ask(client: grpcclient.InferenceServerClient, prompt: str, max_tokens: int) -> str:
    async for result, error in client.stream_infer(requests(prompt, max_tokens)):
        if error is not None:
            return f"{prompt} -> error: {error.message()}"
        text = result.as_numpy("text_output")[0].decode()
        return f"{prompt} -> {text} ({result.as_numpy('num_tokens').item()} tokens)"
    return f"{prompt} -> no answer"


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--max_tokens", type=int, default=64)
    arguments = parser.parse_args()
    async with grpcclient.InferenceServerClient(arguments.url) as client:
        questions = [ask(client, prompt, arguments.max_tokens) for prompt in arguments.prompt]
        for answer in asyncio.as_completed(questions):
            print(await answer)


if __name__ == "__main__":
    asyncio.run(main())
