"""One rank of a job that serves: `rank_server.py --engine_dir D --device cpu --hang_after_s N`.

The leader has a `Server` and clients that ask without end, says "ready" after the first answer, and
ends as a door does when a part has died. How many waited for an answer then, and got one, is its
last word.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nvlm.program import command_line
from nvlm.program.command_line import ArgumentParser, positive_float
from nvlm.program.launcher import end, rank_from
from runtime.decoder.executor import DecoderOptions
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.launch import Program, add_engine_flags, launch
from runtime.serving.runner import Runner
from runtime.serving.server import Server

NUM_CLIENTS = 4


def lead(hang_after_s: float, _: torch.device, open_runner: Callable[[], Runner]) -> int:
    ended: SimpleQueue[Exception] = SimpleQueue()
    heard: SimpleQueue[Answer] = SimpleQueue()
    with open_runner() as runner:
        server = Server(runner, on_end=ended.put, hang_after_s=hang_after_s)

        def client() -> None:
            while server.failure is None:
                answers: SimpleQueue[Answer] = SimpleQueue()
                server.submit(GenerationRequest.of("Well?", max_new_tokens=40), answers.put)
                while not (answer := answers.get()).is_last:
                    pass
                heard.put(answer)
                if answer.error is not None:
                    return

        for _number in range(NUM_CLIENTS):
            threading.Thread(target=client, daemon=True).start()
        heard.get()
        print("ready", file=sys.stderr, flush=True)
        error = ended.get()
        num_errors = sum(heard.get(timeout=60).error is error for _ in range(NUM_CLIENTS))
        while num_errors < NUM_CLIENTS:
            num_errors += heard.get(timeout=60).error is error
        print(f"{num_errors} clients got the error", file=sys.stderr, flush=True)
        server.close()
        raise error


def parse() -> Program:
    parser = ArgumentParser("serves")
    add_engine_flags(parser)
    parser.add_argument("--hang_after_s", type=positive_float, required=True)
    arguments = parser.parse_args()
    return Program(
        arguments.engine_dir,
        arguments.device,
        DecoderOptions(),
        partial(lead, arguments.hang_after_s),
    )


if __name__ == "__main__":
    command_line.run(lambda: launch(os.environ, parse), rank=rank_from(os.environ), end=end)
