"""What HTTP costs on a GPU: tokens/s and the first token through it, beside runtime/serving alone.

    python -m bench.hopper.http [--shape 72b --layers 80] [--load 1000/256/128/64] [--rounds 2]
        [--num_first 10] [--output FILE]

One runner of random weights and one `Server`. The same load comes in turns from this process
through `Server.submit`, and as aiperf's bodies from a client process over real connections. Every
round has prompts of its own, so that none is found in the KV cache. Then pictures of seven tiles
come one by one, in turns too, and the time until the client has the first text is taken. The last
line is JSON: `ratio` of the tokens/s, `later_ms` of the first token.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bench.hopper.decoder import PAUSE_S
from bench.hopper.device import device_for
from bench.hopper.interactive import picture_tokens
from bench.hopper.parts import OneDevice
from bench.hopper.serving import Load, answer_all, loads
from bench.machine import describe, describe_gpu
from bench.serving.http_clients import Body, Clients
from bench.synthetic_engine import DECODERS, VISIONS, synthetic_engine
from bench.synthetic_runner import draw_pictures, picture_request, synthetic_runner, text_request
from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions
from frontends.openai.http_server import HttpServer
from frontends.openai.listener import open_listener
from frontends.openai.protocol import Timeouts
from nvlm.program.json_files import write_json_atomically
from nvlm.program.process import set_up_cublas
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.server import Server

_SEEDS = 10_000  # of a round
_FIRST_ANSWER = 4
_LONG_S = 60.0


def aiperf_body(request: GenerationRequest, pictures: list[Path]) -> Body:
    """The request as aiperf 0.13.0 sends one, but for a picture before the text, so that the prompt
    is the same."""
    parts: list[Body] = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{_base64(picture)}"},
        }
        for picture in pictures
    ]
    text = "".join(part for part in request.content if isinstance(part, str)).removeprefix("\n")
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "model": "nvlm-d",
        "stream": True,
        "max_completion_tokens": request.max_new_tokens,
        "stream_options": {"include_usage": True},
    }


def measure_load(server: Server, clients: Clients, load: Load, rounds: int) -> dict[str, Any]:
    """Tokens/s of each round, of both ways in turns."""
    own: list[float] = []
    over_http: list[float] = []
    for number in range(2 * rounds):
        requests = [
            text_request(server.runner, load.num_input, load.num_output, _SEEDS * number + i)
            for i in range(load.num_requests)
        ]
        if number % 2 == 0:
            num_tokens, seconds = answer_all(server, requests, load.at_a_time)
            own.append(num_tokens / seconds)
            print(f"alone      {own[-1]:8.1f} tokens/s", flush=True)
        else:
            answers, seconds = clients.ask([aiperf_body(request, []) for request in requests])
            assert {answer.num_prompt_tokens for answer in answers} == {load.num_input}
            over_http.append(sum(answer.num_tokens for answer in answers) / seconds)
            print(f"over HTTP  {over_http[-1]:8.1f} tokens/s", flush=True)
    return {
        "tokens_per_s": own,
        "http_tokens_per_s": over_http,
        "ratio": statistics.median(over_http) / statistics.median(own),
    }


def measure_first(
    server: Server, clients: Clients, folder: Path, num_pictures: int
) -> dict[str, Any]:
    """Milliseconds from the question to its first text, of pictures one by one."""
    vision = server.runner.engine.vision_config
    own: list[float] = []
    over_http: list[float] = []
    pictures = draw_pictures(folder, 2 * num_pictures + 2, vision.image_size)
    for number, picture in enumerate(pictures):
        request = picture_request(
            server.runner, picture, picture_tokens(vision), _FIRST_ANSWER, number
        )
        time.sleep(PAUSE_S)
        if number % 2 == 0:
            own.append(_first_ms(server, request))
        else:
            (answer,), _ = clients.ask([aiperf_body(request, [picture])])
            assert answer.num_prompt_tokens == picture_tokens(vision)
            over_http.append(answer.first_ms)
    own, over_http = own[1:], over_http[1:]  # the first one of each warms
    return {
        "first_token_ms": own,
        "http_first_token_ms": over_http,
        "later_ms": statistics.median(over_http) - statistics.median(own),
    }


def _first_ms(server: Server, request: GenerationRequest) -> float:
    heard: SimpleQueue[tuple[float, Answer]] = SimpleQueue()
    begun = time.perf_counter()
    server.submit(request, lambda answer: heard.put((time.perf_counter(), answer)))
    first, answer = heard.get(timeout=_LONG_S)
    while not answer.is_last:
        _, answer = heard.get(timeout=_LONG_S)
    if answer.error is not None:
        raise answer.error
    return 1e3 * (first - begun)


def _base64(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


@contextmanager
def serving(runner: Runner, load: Load) -> Iterator[tuple[Server, int]]:
    """A server, and the port at which it answers over HTTP too."""
    server, door = Server(runner, max_queue_size=load.num_requests), Door(DoorOptions())
    door.open(server)
    try:
        with HttpServer(application(door), open_listener("127.0.0.1", 0), Timeouts()) as http:
            yield server, http.port
    finally:
        door.close()
        server.close()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=DECODERS, default="72b")
    add("--layers", type=int, default=80)
    add("--load", type=loads, default=loads("1000/256/128/64"), help="as bench.hopper's --serving")
    add("--rounds", type=int, default=2, help="of each way")
    add("--num_first", type=int, default=10, help="pictures of each way")
    add("--no_graphs", action="store_true")
    add("--output", type=Path)
    options = parser.parse_args(arguments)
    set_up_cublas(os.environ)
    device = device_for(options.shape, parser)
    (load,) = options.load
    picture_length = picture_tokens(VISIONS[options.shape]) + _FIRST_ANSWER
    engine = synthetic_engine(
        options.shape,
        options.layers,
        max_batch_size=load.at_a_time,
        max_seq_len=max(load.num_input + load.num_output, picture_length) + 64,
    )
    parts = OneDevice(device, use_graphs=not options.no_graphs)
    vision = parts.vision(engine, "FP8")
    decoder = parts.decoder(engine)
    with tempfile.TemporaryDirectory() as name:
        runner = synthetic_runner(Path(name), engine, vision, decoder)
        with serving(runner, load) as (server, port), Clients(port, load.at_a_time) as clients:
            found = {
                "machine": describe() | describe_gpu(device),
                "layers": options.layers,
                "load": f"{load.num_input}/{load.num_output}/{load.num_requests}/{load.at_a_time}",
                **measure_first(server, clients, Path(name) / "pictures", options.num_first),
                **measure_load(server, clients, load, options.rounds),
            }
    if options.output is not None:
        write_json_atomically(options.output, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
