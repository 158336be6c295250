"""run.py as one rank of a test starts it: `rank_program.py <what> <run.py's flags>`.

`kill=PHASE` kills rank 1 with SIGKILL as soon as it enters the phase, `raise=PHASE` has it raise;
`version=V` gives rank 1 another version; `record=DIR` writes what each rank opened and holds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run
from nvlm import command_line, manifest
from runtime.decoder import torch_executor
from runtime.decoder.torch_weights import DecoderWeights
from runtime.mpi import Job, end, rank_from

RANK = rank_from(os.environ)


def fail_at(phase: str, *, killed: bool) -> None:
    original = Job.phase

    def announce(job: Job, name: str) -> None:
        original(job, name)
        if name != phase or RANK != 1:
            return
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the test's failure")

    Job.phase = announce  # type: ignore[method-assign]


def record(directory: Path) -> None:
    """Files opened below any `llm` folder, and the bytes of the decoder's tensors.

    Reading the manifest hashes small files, as rank files are in tests only: that is switched off.
    """
    manifest._SMALL_FILE_BYTES = 0
    opened: set[str] = set()
    original = torch_executor.load_weights

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
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        found = {"files": sorted(opened | mapped), "bytes": num_bytes}
        (directory / f"rank{RANK}.json").write_text(json.dumps(found))
        return weights

    sys.addaudithook(audit)
    torch_executor.load_weights = load


def main() -> None:
    what, _, value = sys.argv.pop(1).partition("=")
    if what in ("kill", "raise"):
        fail_at(value, killed=what == "kill")
    elif what == "version" and RANK == 1:
        sys.modules["nvlm"].__version__ = value
    elif what == "record":
        record(Path(value))
    command_line.run(run.main, rank=RANK, end=end)


if __name__ == "__main__":
    main()
