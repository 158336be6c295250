"""One rank of a test's job: the same requests on all ranks, then on the leader alone.

    rank_answers.py <engine of all ranks> <engine of one> <requests.jsonl> <folder of results>

The leader writes found.json: token ids, text as it was streamed, a request that outlives its
cancelled neighbour, and how far logits are apart. Every rank writes rank<r>.json: which files of
the decoder it opened and the bytes of its weights.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nvlm.formats import manifest
from nvlm.program import command_line
from nvlm.program.launcher import World, end, rank_from
from runtime.answers.compare import Run, differences, record
from runtime.decoder.executor import DecoderOptions
from runtime.decoder.models import open_model
from runtime.decoder.models.torch_weights import DecoderWeights
from runtime.ranks.mpi import Job
from runtime.ranks.open_parts import open_engine_on_ranks, open_parts_on_ranks, work
from runtime.requests.request_file import read_requests
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.loop import Loop
from runtime.serving.runner import Runner

CPU = torch.device("cpu")


def watch_files(directory: Path, rank: int) -> None:
    """Notes what the first load of weights opens and holds.

    A manifest's reader hashes small files, as rank files are in tests only: that is switched off.
    """
    manifest._SMALL_FILE_BYTES = 0
    opened: set[str] = set()
    original = open_model.load_weights

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and "/llm/" in str(arguments[0]):
            opened.add(Path(str(arguments[0])).name)

    def load(*arguments: object, **named: object) -> DecoderWeights:
        weights = original(*arguments, **named)  # type: ignore[arg-type]
        maps = Path("/proc/self/maps").read_text().split()
        mapped = {Path(word).name for word in maps if "/llm/" in word}
        tensors = [weights.embedding, weights.final_norm, *weights.lm_head.parameters()]
        for layer in weights.layers:
            tensors += [layer.input_layernorm, layer.post_layernorm, *layer.parameters()]
        found = {"files": sorted(opened | mapped), "bytes": sum(t.nbytes for t in tensors)}
        (directory / f"rank{rank}.json").write_text(json.dumps(found))
        open_model.load_weights = original
        return weights

    sys.addaudithook(audit)
    open_model.load_weights = load


def streamed(runner: Runner, request: GenerationRequest) -> list[str]:
    """What each step adds to the text, which may be nothing."""
    heard: list[Answer] = []
    pieces: list[str] = []
    with Loop(runner, max_open=1) as loop:
        loop.submit(request, heard.append)
        while loop.num_open:
            loop.turn()
            pieces.append("".join(answer.text for answer in heard))
            heard.clear()
    return pieces


def beside_a_cancelled_one(
    runner: Runner, cancelled: GenerationRequest, request: GenerationRequest
) -> list[int]:
    unwanted: list[Answer] = []
    pieces: list[Answer] = []
    with Loop(runner, max_open=2) as loop:
        ticket = loop.submit(cancelled, unwanted.append)
        loop.submit(request, pieces.append)
        loop.turn()
        loop.turn()
        loop.cancel(ticket)
        unwanted.clear()
        while loop.num_open:
            loop.turn()
    assert unwanted == []
    assert pieces[-1].result is not None
    return pieces[-1].result.token_ids


def ask(runner: Runner, requests: list[GenerationRequest]) -> tuple[Run, dict[str, Any]]:
    run = record(runner, requests)
    return run, {
        "token_ids": [recording.token_ids for recording in run.recordings],
        "streamed": streamed(runner, requests[0]),
        "outlived": beside_a_cancelled_one(runner, requests[0], requests[1]),
    }


def main() -> None:
    many, one, requests_file, directory = (Path(argument) for argument in sys.argv[1:])
    with Job(World.from_environment(os.environ)) as job:
        watch_files(directory, job.world.rank)
        engine = open_engine_on_ranks(many, CPU, job)
        if job.world.rank > 0:
            work(engine, CPU, job, DecoderOptions())
            return
        lines = read_requests(requests_file, GenerationRequest.images_first(""))
        requests = [line.request for line in lines if isinstance(line.request, GenerationRequest)]
        parts = open_parts_on_ranks(engine, CPU, job, DecoderOptions())
        with Runner(engine, *parts) as runner:
            ours, found = ask(runner, requests)
        with Runner.open(one, CPU) as runner:
            reference, expected = ask(runner, requests)
        rows = [asdict(difference) for difference in differences(ours, reference)]
        got = {"many": found, "one": expected, "differences": rows}
        (directory / "found.json").write_text(json.dumps(got))


if __name__ == "__main__":
    command_line.run(main, rank=rank_from(os.environ), end=end)
