"""Minutes under load, and deaths: `make soak MINUTES=N`.

A rank, the model's process, the decoder's thread and tritonserver die in turn under the load of
load.py, and of serve.py the decoder's thread and a rank: each is noticed, no request waits for
long, and the server that starts again answers as before. Then the load goes to a server that stays
up: every valid answer as when alone, memory flat. Progress goes to stderr, what was found to
stdout, as JSON. Exit code 1: not all of it held.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build.conversion.convert import convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.program.command_line import EXIT_PART_DIED, ArgumentParser, positive_float, run
from tests.conftest import CPU, FP32, MEMORY_BYTES, Workshop
from tests.faults.http_deaths import Death, kill_a_rank, sabotage_decoder
from tests.faults.load import Load, Tally
from tests.faults.questions import Question, answers_alone, make_questions
from tests.faults.triton_door import TritonDoor
from tests.frontends.test_triton_dead_parts import (
    ANSWERED_S,
    NOTICED_S,
    Serving,
    running_in_group,
    serving,
)
from tests.ranks.test_rank_server import after_signal
from tests.support.ranks import MPIRUN, engine_of
from tests.support.sabotage import END_DECODER, HANG_DECODER, Sabotaged

WARM_S = 300.0  # at most a third of the whole: caches fill, and allocators take what they need
LEAST_LOAD_S = 20.0
SAMPLE_S = 2.0
HANG_AFTER_S = 10.0
MOST_GROWTH = 0.05
REQUESTS_AFTER_RESTART = 100


@dataclass(slots=True)
class Found:
    """What is reported; `faults` are what did not hold."""

    faults: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def require(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)
            say(f"FAULT: {fault}")

    def take(self, name: str, tally: Tally) -> None:
        self.values[name] = {"requests": tally.total, **dict(sorted(tally.done.items()))}
        self.values[name]["ended_with_the_server"] = len(tally.gone)
        for wrong in tally.wrong:
            self.require(False, wrong)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def measure(server: Serving, load: Load, seconds: float) -> list[int]:
    """Resident bytes of the server under load, every `SAMPLE_S`."""
    samples = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load.wait(SAMPLE_S)
        samples.append(server.served.memory_bytes())
    return samples


def stay_up(
    engine_dir: Path, folder: Path, asked: tuple[list[Question], list[str]], seconds: float
) -> Found:
    """The load on a server that nobody kills."""
    found = Found()
    warm_s = min(WARM_S, seconds / 3)
    with serving(engine_dir, folder) as server:
        load = Load(TritonDoor(server.served, *asked), random.randrange(1 << 32)).start()
        load.wait(warm_s)
        samples = measure(server, load, seconds - warm_s)
        tally = load.stop()
        server.served.wait_for_sample("nvlm_requests_running", 0, timeout_s=60)
        server.served.wait_for_sample("nvlm_requests_waiting", 0, timeout_s=60)
        failed = server.served.samples().get('nvlm_requests_total{outcome="failed"}', 0.0)
        found.require(server.process.poll() is None, "the server ended by itself")
    part = max(1, len(samples) // 5)
    first, last = statistics.median(samples[:part]), statistics.median(samples[-part:])
    growth = last / first - 1
    found.take("load", tally)
    found.values["load"] |= {
        "seconds": round(seconds),
        "warm_s": round(warm_s),
        "first_MB": round(first / 1e6),
        "last_MB": round(last / 1e6),
        "growth_percent": round(100 * growth, 2),
    }
    say(f"load: {tally.total} requests, {len(tally.wrong)} wrong, memory {100 * growth:+.1f} %")
    found.require(growth <= MOST_GROWTH, f"memory grew by {100 * growth:.1f} %")
    found.require(failed == 0, f"{failed:.0f} requests failed")
    return found


def die_in_turn(engine_dir: Path, folder: Path, asked: tuple[list[Question], list[str]]) -> Found:
    """Each part under load, in a server that starts again."""
    found = Found()
    sabotaged = Sabotaged(folder)
    with serving(engine_dir, folder, "--restart", cwd=sabotaged.folder) as server:
        parts: dict[str, Callable[[], None]] = {
            "model process": lambda: os.kill(server.model_process, signal.SIGKILL),
            "decoder's thread": lambda: sabotaged.order(END_DECODER),
            "tritonserver": lambda: os.kill(server.tritonserver, signal.SIGKILL),
        }
        door = TritonDoor(server.served, *asked)
        load = Load(door, random.randrange(1 << 32), may_go=True).start()
        for number, (part, kill) in enumerate(parts.items(), start=1):
            load.wait_for(REQUESTS_AFTER_RESTART)
            group = server.tritonserver
            killed = time.monotonic()
            kill()
            while load.tally.since(killed) and time.monotonic() < killed + 60:
                time.sleep(0.02)
            answered_s = time.monotonic() - killed
            left = load.tally.since(killed)
            server.wait_for("starting again: ", number)
            noticed_s = time.monotonic() - killed
            server.wait_for("ready: ", number + 1)
            again_s = time.monotonic() - killed
            found.values[part] = {
                "answered_s": round(answered_s, 2),
                "ended_s": round(noticed_s, 2),
                "ready_s": round(again_s, 2),
            }
            say(f"{part}: all answered after {answered_s:.1f} s, ready after {again_s:.1f} s")
            # The line comes when the server has been stopped: it was noticed before.
            found.require(noticed_s < NOTICED_S + ANSWERED_S, f"{part}: ended in {noticed_s:.1f} s")
            waited = f"{part}: requests waited {answered_s:.1f} s, the last {left}"
            found.require(answered_s < ANSWERED_S, waited)
            found.require(running_in_group(group) == [], f"{part}: processes are left")
        load.wait_for(REQUESTS_AFTER_RESTART)
        found.take("deaths", load.stop())
    return found


def lose_a_rank(folder: Path) -> Found:
    found = Found()
    if MPIRUN is None:
        say("a rank: skipped, there is no mpirun")
        return found
    ended = after_signal(Workshop(folder), folder, signal.SIGKILL)
    found.values["rank"] = {"ended_s": round(ended.seconds, 2), "exit_code": ended.returncode}
    say(f"a rank: all ended after {ended.seconds:.1f} s")
    found.require(ended.returncode != 0, "a job without one of its ranks ended with 0")
    found.require("rank 1 died in phase" in ended.stderr, "the dead rank is not named")
    found.require(ended.seconds < ANSWERED_S, f"a job ended {ended.seconds:.1f} s after its rank")
    return found


def die_over_http(engine_dir: Path, folder: Path) -> Found:
    """The parts of serve.py, which ends with its own code each time."""
    found = Found()

    def take(part: str, death: Death, code: int, limit_s: float = 0.0) -> None:
        seconds = death.answered_s
        name = f"serve.py: {part}"
        found.values[name] = {
            "health": death.health,
            "noticed_s": round(death.noticed_s, 2),
            "answered_s": round(seconds, 2),
            "exit_code": code,
        }
        found.take(f"{name}, load", death.tally)
        say(f"{name}: all answered after {seconds:.1f} s, exit code {code}")
        found.require(death.health == 503, f"{name}: /health is {death.health}")
        found.require(death.noticed_s < limit_s + NOTICED_S, f"{name}: {death.noticed_s:.1f} s")
        waited = f"{name}: requests waited {seconds:.1f} s, the last {death.left}"
        found.require(seconds < limit_s + ANSWERED_S, waited)
        found.require(code == EXIT_PART_DIED, f"{name}: exit code {code}")

    for part, order, limit_s in (
        ("decoder's thread", END_DECODER, 0.0),
        ("decoder's thread hangs", HANG_DECODER, HANG_AFTER_S),
    ):
        own = folder / part.replace(" ", "_")
        own.mkdir()
        flags = ("--hang_after_s", limit_s) if limit_s else ()
        death, _ = sabotage_decoder(engine_dir, own, REQUESTS_AFTER_RESTART, order, *flags)
        take(part, death, EXIT_PART_DIED, limit_s)  # with another code it raises
    if MPIRUN is not None:
        own = folder / "rank"
        own.mkdir()
        engine = engine_of(Workshop(own), 2, FP32)
        death, status, _ = kill_a_rank(engine, own, REQUESTS_AFTER_RESTART)
        take("a rank", death, status >> 8)
    return found


def make_engine(folder: Path) -> Path:
    workshop = Workshop(folder)
    model = workshop.model("model")
    checkpoint, engine = folder / "checkpoint", folder / "engine"
    convert(HuggingFaceSource(model), checkpoint, FP32, CPU)
    options = BuildOptions(vision="torch", max_num_images=3)
    build_engine(specify(checkpoint, options, CPU, MEMORY_BYTES), engine, options)
    return engine


def main() -> int:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=positive_float, default=10.0, help="of all together")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nvlm_soak_") as name:
        folder = Path(name)
        os.environ["TMPDIR"] = name  # where servers that died leave their logs
        for part in ("engine", "load", "deaths", "http", "ranks"):
            (folder / part).mkdir()
        engine_dir = make_engine(folder / "engine")
        questions = make_questions()
        asked = questions, answers_alone(engine_dir, questions)
        found = [
            lose_a_rank(folder / "ranks"),
            die_in_turn(engine_dir, folder / "deaths", asked),
            die_over_http(engine_dir, folder / "http"),
        ]
        left_s = 60 * arguments.minutes - (time.monotonic() - begun)
        found.append(stay_up(engine_dir, folder / "load", asked, max(LEAST_LOAD_S, left_s)))
    faults = [fault for part in found for fault in part.faults]
    values = {name: value for part in found for name, value in part.values.items()}
    print(json.dumps({**values, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    run(main)
