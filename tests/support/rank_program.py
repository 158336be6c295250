"""run.py as one rank of a test starts it: `rank_program.py <what> <run.py's flags>`.

`kill=PHASE` kills rank 1 with SIGKILL as soon as it enters the phase and says when on stderr,
`raise=PHASE` has it raise; PHASE@R has rank R do it. `version=V` gives rank 1 another version;
`memory=R` leaves rank R little memory; `gpus=N` makes torch see GPUs. `ahead:` before any of them
runs the fast path's plain forms, so that decode steps are in flight.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import run
from nvlm.planning import hopper
from nvlm.program import command_line
from nvlm.program.launcher import end, rank_from
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models import kv_blocks
from runtime.decoder.models.hopper_model import HopperModel
from runtime.ranks import mpi
from runtime.ranks.mpi import Job

RANK = rank_from(os.environ)


def fail_at(phase: str, rank: int, *, killed: bool) -> None:
    original = Job.phase

    def announce(job: Job, name: str) -> None:
        original(job, name)
        if name != phase or rank != RANK:
            return
        if killed:
            print(f"killed at {time.monotonic()}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the test's failure")

    Job.phase = announce  # type: ignore[method-assign]


def run_ahead() -> None:
    """On the CPU, where neither Triton nor graphs are: says when graphs come and go."""

    def capture(model: HopperModel, *, with_chunks: bool = True) -> None:
        print("graphs are captured", file=sys.stderr)

    def close(model: HopperModel) -> None:
        assert torch.distributed.is_initialized(), "the group outlives them"
        print("graphs are deleted", file=sys.stderr)

    hopper.takes_fast_path = lambda config, device: True
    forms = ModuleType("runtime.decoder.kernels.triton_forms")
    forms.TritonForms = lambda *arguments: PlainForms()  # type: ignore[attr-defined]
    sys.modules[forms.__name__] = forms
    HopperModel.capture_graphs = capture  # type: ignore[method-assign]
    HopperModel.close = close  # type: ignore[method-assign]


def main() -> None:
    asked = sys.argv.pop(1)
    if asked.startswith("ahead:"):
        run_ahead()
    what, _, value = asked.removeprefix("ahead:").partition("=")
    if what in ("kill", "raise"):
        phase, _, rank = value.partition("@")
        fail_at(phase, int(rank or 1), killed=what == "kill")
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
