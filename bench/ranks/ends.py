"""How jobs of several ranks end: by themselves with 0, again and again, and after failures.

    python -m bench.ranks.ends --folder D [--num_ranks 2] [--repeats 10] [--device cuda|cpu]
        [--output FILE]

Starts `mpirun run.py` (a question, a batch, --streaming, sampling) and `mpirun evaluate.py
generate` in turns with the trained small model, whose engine is built in the folder first. After
the first turn come the failures, one by one, each in a batch that decodes: a rank killed, an error
on a rank, SIGTERM to the launcher, Control-C to its group. Each is printed with its exit code and
the seconds until no process of it is left. `--output` is written after every job. The last line is
JSON, and the exit code is 1 where a job did not end as docs/ranks.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.hopper.truth import engine_in
from bench.machine import describe, describe_gpu
from nvlm.program.command_line import ArgumentParser, positive_float, positive_int, run
from nvlm.program.errors import UserError
from nvlm.program.json_files import write_json_atomically
from tests.support.benchmarks import ocrbench
from tests.support.ranks import (
    MAX_SECONDS_TO_END,
    MPIRUN,
    PHOTO,
    PROGRAM,
    ROOT,
    command,
    processes_of,
    started,
)
from tools.tiny.evaluation import write_requests

_PER_TASK = 2  # questions of a batch
_NUM_LINES = 20_000  # of a batch that is still decoding when something happens to it
_STDERR_LINES = 12  # of stderr, where a job did not end as it should
_RANK_VARIABLES = (b"PMI_RANK", b"OMPI_COMM_WORLD_RANK")

Happens = Callable[[subprocess.Popen[str], Path], None]
"""What happens to a job, or is waited for; the path is its mark (tests/support/ranks.py)."""
Codes = Callable[[int], bool]
"""Whether an exit code is right."""


@dataclass(frozen=True, slots=True)
class Ended:
    """code: mpirun's; None where it was cut. seconds: from the start, or from what happened to it,
    until no process was left. num_left: processes that were still there when it was cut."""

    name: str
    code: int | None
    seconds: float
    num_left: int
    is_right: bool
    stderr: str

    def __str__(self) -> str:
        line = f"{self.name:<22}code {self.code}, {self.seconds:6.1f} s"
        line += f", {self.num_left} processes left" if self.num_left else ""
        return line + ("" if self.is_right else f"  WRONG\n{self.stderr}")


@dataclass(frozen=True, slots=True)
class Failure:
    """what: rank_program.py does by itself, "" for nothing. happens: the last of them counts."""

    what: str
    codes: Codes
    happens: tuple[Happens, ...]


def end_of(
    name: str,
    words: list[str],
    mark: Path,
    timeout_s: float,
    codes: Codes,
    happens: tuple[Happens, ...] = (),
) -> Ended:
    """Starts a job and waits until all of it is gone: for `timeout_s`, or for `MAX_SECONDS_TO_END`
    after what happens to it."""
    with started(words, mark) as process:
        for each in happens:
            each(process, mark)
        start, limit = time.monotonic(), MAX_SECONDS_TO_END if happens else timeout_s
        stderr, code = "", None
        with suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=limit)
            code = process.returncode
        while (left := processes_of(mark)) and time.monotonic() < start + limit:
            time.sleep(0.05)
        seconds = time.monotonic() - start
        is_right = code is not None and codes(code) and not left
        shown_stderr = "" if is_right else "\n".join(stderr.splitlines()[-_STDERR_LINES:])
        return Ended(name, code, seconds, len(left), is_right, shown_stderr)


def programs(engine: Path, folder: Path, device: str) -> dict[str, list[object]]:
    """Command lines by what they do; what they write goes below the folder's output/."""
    flags = ("--engine_dir", engine, "--device", device)
    question = [ROOT / "run.py", *flags, "--image", PHOTO, "--prompt", "What is in the cup?"]
    requests = write_requests(folder / "questions", _PER_TASK)
    output, benchmark = folder / "output", ocrbench(folder).run_flags
    batch = ("--input_file", requests, "--output_file", output / "answers.jsonl")
    return {
        "question": question,
        "batch": [ROOT / "run.py", *flags, *batch],
        "streaming": [*question, "--streaming"],
        "sampling": [*question, "--temperature", 0.8, "--top_k", 50, "--seed", 1],
        "generate": [
            *(ROOT / "evaluate.py", "generate", *flags, *benchmark),
            *("--output_path", output / "task"),
        ],
    }


def failures(num_ranks: int, output: Path, timeout_s: float) -> dict[str, Failure]:
    """Each in a batch that writes `output`."""
    decodes = partial(_await_lines, output, timeout_s)
    leader, worker = partial(_kill_rank, 0), partial(_kill_rank, num_ranks - 1)
    return {
        "leader killed": Failure("", lambda code: code != 0, (decodes, leader)),
        "worker killed": Failure("", lambda code: code != 0, (decodes, worker)),
        "error on a rank": Failure("raise=decode", lambda code: code == 1, (_await_error,)),
        "SIGTERM": Failure("", _is_interrupted, (decodes, _terminate)),
        "Control-C": Failure("", _is_interrupted, (decodes, _interrupt)),
    }


def _is_interrupted(code: int) -> bool:
    return code in (130, 1)  # 1: Open MPI


def _await_lines(output: Path, timeout_s: float, process: subprocess.Popen[str], _: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not (output.exists() and output.stat().st_size):
        if process.poll() is not None or time.monotonic() > deadline:
            return  # the code will be wrong
        time.sleep(0.05)


def _await_error(process: subprocess.Popen[str], _: Path) -> None:
    """Until the rank's traceback begins."""
    assert process.stderr is not None
    while (line := process.stderr.readline()) and "Traceback" not in line:
        pass


def _kill_rank(rank: int, _: subprocess.Popen[str], mark: Path) -> None:
    if (pid := process_of_rank(rank, mark)) is not None:
        os.kill(pid, signal.SIGKILL)


def _terminate(process: subprocess.Popen[str], _: Path) -> None:
    """Sends SIGTERM, as a scheduler does."""
    process.send_signal(signal.SIGTERM)


def _interrupt(process: subprocess.Popen[str], _: Path) -> None:
    """Sends Control-C, as a terminal does."""
    os.killpg(process.pid, signal.SIGINT)


def process_of_rank(rank: int, mark: Path) -> int | None:
    """The process of a rank's program, not the one that watches the ranks."""
    wanted = {b"%s=%d" % (name, rank) for name in _RANK_VARIABLES}
    for pid in processes_of(mark):
        with suppress(OSError):  # it has ended
            process = Path("/proc") / str(pid)
            is_program = str(PROGRAM).encode() in (process / "cmdline").read_bytes().split(b"\0")
            if is_program and wanted & {*(process / "environ").read_bytes().split(b"\0")}:
                return pid
    return None


class Jobs:
    """Starts jobs one after the other and says how each ended."""

    def __init__(self, options: argparse.Namespace, machine: dict[str, Any]) -> None:
        self._options, self._machine = options, machine
        self._folder = options.folder.resolve()
        self.ended: list[Ended] = []

    def run(
        self, name: str, words: list[object], codes: Codes, happens: tuple[Happens, ...] = ()
    ) -> None:
        output = self._folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        line = command(self._options.num_ranks, *words)
        mark, timeout_s = self._folder / "mark", self._options.timeout_s
        self.ended.append(end_of(name, line, mark, timeout_s, codes, happens))
        print(self.ended[-1], flush=True)
        if self._options.output is not None:
            write_json_atomically(self._options.output, self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self._machine,
            "num_right": sum(job.is_right for job in self.ended),
            "jobs": [asdict(job) for job in self.ended],
        }


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--num_ranks", type=positive_int, default=2)
    add("--repeats", type=positive_int, default=10)
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--timeout_s", type=positive_float, default=90.0, help="of a job, or until it decodes")
    add("--output", type=Path, help="the jobs so far as JSON, after every job")
    options = parser.parse_args(arguments)
    if MPIRUN is None:
        raise UserError("there is no mpirun in PATH; pip install mpi4py mpich")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    engine = engine_in(folder, options.num_ranks).directory
    machine = describe() | describe_gpu(torch.device(options.device))
    jobs = Jobs(options, machine | {"tp_size": options.num_ranks})
    each = programs(engine, folder, options.device)
    lines, output = folder / "many.jsonl", folder / "output" / "many.jsonl"
    lines.write_text('{"prompt": "hi", "max_new_tokens": 9}\n' * _NUM_LINES)
    engine_flags = ("--engine_dir", engine, "--device", options.device)
    many = (*engine_flags, "--input_file", lines, "--output_file", output)
    for turn in range(options.repeats):
        for name, words in each.items():
            jobs.run(name, words, lambda code: code == 0)
        if turn == 0:
            for name, failure in failures(options.num_ranks, output, options.timeout_s).items():
                words = [PROGRAM, failure.what, *many]
                jobs.run(name, words, failure.codes, failure.happens)
    print(json.dumps(jobs.to_json()))
    return 0 if all(job.is_right for job in jobs.ended) else 1


if __name__ == "__main__":
    run(main)
