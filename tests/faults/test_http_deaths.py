"""A part of serve.py dies or hangs under load: nobody waits for long, and it ends with code 3."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm.program.command_line import EXIT_PART_DIED
from tests.conftest import FP32, Workshop
from tests.faults.http_deaths import Death, kill_a_rank, sabotage_decoder
from tests.faults.load import NUM_CLIENTS
from tests.frontends.test_triton_dead_parts import ANSWERED_S, BUSY, NOTICED_S
from tests.support.ranks import engine_of, needs_mpi
from tests.support.sabotage import END_DECODER, HANG_DECODER

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="requirements/serving.txt is not installed")

HANG_AFTER_S = 10


def assert_reported(death: Death, limit_s: float = 0.0, *, is_brief: bool = False) -> None:
    assert death.left == []
    # A rank's leader is there for two seconds more, which a busy machine may miss.
    assert death.health in ((503, None) if is_brief else (503,))
    assert death.tally.gone, "no request was in flight"
    assert death.tally.wrong == []
    assert death.noticed_s < limit_s + BUSY * NOTICED_S
    assert death.answered_s < limit_s + BUSY * ANSWERED_S


@pytest.mark.parametrize(
    ("order", "flags", "message", "limit_s"),
    [
        (END_DECODER, (), "the decoder's thread has ended: SystemExit", 0.0),
        pytest.param(
            HANG_DECODER,
            ("--hang_after_s", HANG_AFTER_S),
            f"the decoder's thread has made no progress for {HANG_AFTER_S} s",
            HANG_AFTER_S,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ends", "hangs"],
)
def test_the_decoders_thread(
    float32_engine_dir: Path,
    tmp_path: Path,
    order: str,
    flags: tuple[object, ...],
    message: str,
    limit_s: float,
) -> None:
    death, log = sabotage_decoder(float32_engine_dir, tmp_path, NUM_CLIENTS, order, *flags)
    assert_reported(death, limit_s)
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert message in error


@needs_mpi
@pytest.mark.mpi
def test_a_rank_also_where_the_launcher_ends_nobody(workshop: Workshop, tmp_path: Path) -> None:
    death, status, log = kill_a_rank(engine_of(workshop, 2, FP32), tmp_path, NUM_CLIENTS)
    assert_reported(death, is_brief=True)
    assert status == EXIT_PART_DIED << 8
    assert "rank 1 died in phase" in log
