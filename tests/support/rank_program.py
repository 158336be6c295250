"""run.py as one rank of a test starts it: `rank_program.py <what> <run.py's flags>`.

`kill=PHASE` kills rank 1 with SIGKILL as soon as it enters the phase and tells when on stderr,
`raise=PHASE` has it raise; `version=V` gives rank 1 another version; `memory=R` leaves rank R
little memory; `gpus=N` makes torch see GPUs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import run
from nvlm.program import command_line
from nvlm.program.launcher import end, rank_from
from runtime.decoder.models import kv_blocks
from runtime.ranks import mpi
from runtime.ranks.mpi import Job

RANK = rank_from(os.environ)


def fail_at(phase: str, *, killed: bool) -> None:
    original = Job.phase

    def announce(job: Job, name: str) -> None:
        original(job, name)
        if name != phase or RANK != 1:
            return
        if killed:
            print(f"killed at {time.monotonic()}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the test's failure")

    Job.phase = announce  # type: ignore[method-assign]


def main() -> None:
    what, _, value = sys.argv.pop(1).partition("=")
    if what in ("kill", "raise"):
        fail_at(value, killed=what == "kill")
    elif what == "version" and RANK == 1:
        sys.modules["nvlm"].__version__ = value
    elif what == "memory" and int(value) == RANK:
        kv_blocks.total_memory_bytes = lambda device: 1000
    elif what == "gpus":
        torch.cuda.is_available = lambda: True
        mpi.visible_gpus = lambda: [str(i) for i in range(int(value))]
    command_line.run(run.main, rank=RANK, end=end)


if __name__ == "__main__":
    main()
