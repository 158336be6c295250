"""Whether ranks answer as one GPU does: the trained small model on its held-out questions.

    mpirun -n 2 python -m bench.ranks.truth --folder D [--per_task 40] [--steps 1000]
        [--device cuda|cpu]

Makes what is missing in the folder, as bench/hopper/truth.py does, and an engine for these ranks
with the scales of the one for one rank. Then opens it by the product's door
(runtime/ranks/open_parts.py) once for each of:

- as built: the answers beside those of the leader's device alone, and beside the folder's answers
  of a CPU, if it holds some;
- without graphs: the same logits, bit for bit;
- joining: random batches, which requests join and leave for `--steps` steps. After every step
  the ranks compare checksums of all their sums;
- joining, not ahead: the same requests, where no step is launched before the one before is done.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import distributed_c10d

from bench.hopper.truth import (
    MAX_NEW_TOKENS,
    answers,
    compared,
    engine_in,
    questions,
)
from bench.machine import describe, describe_gpu
from bench.ranks.checksums import Checksums, checking
from bench.ranks.joining import Guest, guests, serve
from nvlm.program import command_line
from nvlm.program.errors import UserError
from nvlm.program.launcher import World, end, rank_from
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.answers.compare import Run, record
from runtime.decoder.executor import DecoderOptions
from runtime.decoder.models.open_model import OpenedModel
from runtime.decoder.models.step import DecoderModel, SequenceStep
from runtime.engine.engine_dir import EngineDir
from runtime.ranks import open_parts
from runtime.ranks.mpi import Job
from runtime.ranks.parallel_decoder import open_parallel_model
from runtime.ranks.process_group import ProcessGroup
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner


class NotAhead:
    """A `DecoderModel` that is asked for a step only when the one before has its tokens."""

    def __init__(self, own: DecoderModel) -> None:
        self._own = own

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        return self._own.forward(steps)

    def close(self) -> None:
        self._own.close()


@contextmanager
def opening(
    *, use_graphs: bool = True, is_ahead: bool = True, checksums: Checksums | None = None
) -> Iterator[None]:
    """Makes the product open the decoder so, while the block runs."""

    def open_changed(
        engine: EngineDir, device: torch.device, group: ProcessGroup, **named: Any
    ) -> OpenedModel:
        with nullcontext() if checksums is None else checking(checksums, group):
            opened = open_parallel_model(
                engine, device, group, **{**named, "use_graphs": use_graphs}
            )
        return opened if is_ahead else OpenedModel(NotAhead(opened.model), opened.num_blocks)

    with patch.object(open_parts, "open_parallel_model", open_changed):
        yield


class Ranks:
    """Opens one engine again and again, on all ranks of a job."""

    def __init__(self, job: Job, engine: EngineDir, device: torch.device) -> None:
        self._job, self._engine, self._device = job, engine, device
        self._num_opened = 0

    @contextmanager
    def runner(self) -> Iterator[Runner | None]:
        """The leader's; None on a worker, which has done its part by then."""
        engine, options = self._engine, DecoderOptions()
        # torch names a group by this count, which starts again when the last group ends; its
        # symmetric memory knows a group by the name, so it would find the one that has ended.
        distributed_c10d._world.group_count = self._num_opened
        self._num_opened += 1
        if self._job.world.rank > 0:
            open_parts.work(engine, self._device, self._job, options)
            yield None
            return
        parts = open_parts.open_parts_on_ranks(engine, self._device, self._job, options)
        with Runner(engine, *parts) as runner:
            yield runner

    def record(self, requests: list[GenerationRequest], *, use_graphs: bool = True) -> Run | None:
        with opening(use_graphs=use_graphs), self.runner() as runner:
            return None if runner is None else record(runner, requests)

    def serve(
        self, requests: list[GenerationRequest], num_steps: int, *, is_ahead: bool
    ) -> tuple[list[Guest], dict[str, int]]:
        """Also what the checksums say: how many steps were compared, of so many sums, and how many
        sums of a step have ever differed."""
        num_sums = 2 * self._engine.checkpoint_config.decoder.num_hidden_layers
        checksums = Checksums(num_sums, self._device)
        with opening(is_ahead=is_ahead, checksums=checksums), self.runner() as runner:
            if runner is None:
                return [], {}
            counts = {"num_steps": 0, "num_sums": checksums.num_sums, "num_different": 0}

            def compare() -> None:
                counts["num_steps"] += 1
                counts["num_different"] = checksums.num_different()

            everyone = guests(requests, num_steps * 16, MAX_NEW_TOKENS)
            serve(runner, everyone, num_steps, compare)
            return everyone, counts


def same_bits(found: Run, expected: Run) -> dict[str, int]:
    pairs = list(zip(found.recordings, expected.recordings, strict=True))
    return {
        "num_answers": len(pairs),
        "num_equal_logits": sum(torch.equal(a.logits, b.logits) for a, b in pairs),
    }


def same_tokens(found: list[Guest], expected: list[Guest]) -> dict[str, Any]:
    """Compares the tokens of those who were answered, or left, in both."""
    pairs = [
        (index, a.heard, b.heard) for index, (a, b) in enumerate(zip(found, expected, strict=True))
    ]
    both = [(index, a, b) for index, a, b in pairs if a is not None and b is not None]
    different = [index for index, a, b in both if a != b]
    return {"num_answers": len(both), "different": different}


def main(arguments: list[str] | None = None) -> None:
    world = World.from_environment(os.environ)
    if world.size == 1:
        raise UserError("one rank is running; use mpirun -n 2, or bench.hopper.truth for one GPU")
    set_up_cublas(os.environ)
    set_up_nccl(os.environ)
    with Job(world) as job:
        options = job.agree(lambda: options_of(arguments))
        device = job.device(torch.device(options.device))
        if device.type == "cpu":
            torch.set_num_threads(world.share_of(torch.get_num_threads()))
        truth(options, device, job)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--per_task", type=command_line.positive_int, default=40)
    add("--steps", type=command_line.positive_int, default=1000, help="of the random batches")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    return parser.parse_args(arguments)


def truth(options: argparse.Namespace, device: torch.device, job: Job) -> None:
    is_leader, found = job.world.rank == 0, dict[str, Any]()

    def show(name: str, values: dict[str, Any]) -> None:
        found[name] = values
        print(name, json.dumps(values), flush=True)

    def make() -> list[GenerationRequest]:
        options.folder.mkdir(parents=True, exist_ok=True)
        engine_in(options.folder, job.world.size)
        return list(questions(options.folder / "pictures", options.per_task))

    requests = job.agree(make if is_leader else list[GenerationRequest])
    engine = open_parts.open_engine_on_ranks(
        options.folder / f"engine_{job.world.size}", device, job
    )
    one: Run | None = None
    if is_leader:
        one = answers(engine_in(options.folder), device, requests)
    ranks = Ranks(job, engine, device)
    built = ranks.record(requests)
    if built is not None and one is not None:
        show("as built, beside one", compared(built, one))
        stored = options.folder / f"reference_{options.per_task}.pt"
        if stored.exists():
            expected = torch.load(stored, weights_only=False)
            show("as built, beside the CPU", compared(built, expected))
            show("one, beside the CPU", compared(one, expected))
    eager = ranks.record(requests, use_graphs=False)
    if built is not None and eager is not None:
        show("without graphs, beside as built", same_bits(eager, built))
    joined, counts = ranks.serve(requests, options.steps, is_ahead=True)
    if is_leader:
        show("sums of joining", counts)
    waited, counts = ranks.serve(requests, options.steps, is_ahead=False)
    if is_leader:
        show("sums of joining, not ahead", counts)
        show("joining, beside not ahead", same_tokens(joined, waited))
        machine = describe() | describe_gpu(device) | {"tp_size": job.world.size}
        print(json.dumps({"machine": machine, **found}))


if __name__ == "__main__":
    command_line.run(main, rank=rank_from(os.environ), end=end)
