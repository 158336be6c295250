"""The programs that measure several ranks run on the CPU's too, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.ceilings import Ceilings
from bench.report import Report, step_times
from bench.rows import Row
from nvlm.program.errors import UserError
from tests.support.ranks import command, finished, needs_mpi

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")

TINY = ("--shape", "tiny", "--layers", 2, "--batch_sizes", "1,2", "--context", 64, "--prompts", 40)


def program(
    num_ranks: int, folder: Path, module: str, *arguments: object
) -> tuple[dict[str, Any], str]:
    """The last line's JSON, and all that was said."""
    result = finished(command(num_ranks, "-m", module, *arguments), folder)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found, result.stdout


@needs_mpi
@pytest.mark.mpi
@pytest.mark.process
def test_two_ranks_go_through_the_phases_of_one(tmp_path: Path) -> None:
    """Beside one GPU's rows, of which the file holds a step at batch 1 alone."""
    one, output, profile = (tmp_path / name for name in ("one.json", "two.json", "profile.log"))
    rows = [{"phase": "decode", "num_layers": 2, "batch_size": 1, "num_tokens": 64, "ms": 5.0}]
    one.write_text(json.dumps({"rows": rows}))
    phases = ("decode", "prefill", "first_token", "serving", "interactive")
    files = ("--one", one, "--output", output, "--profile", profile)
    load = ("--serving", "64/3/4/2", "--picture_rate", 4, "--seconds", 0.5, "--precisions", "FP8")
    found, printed = program(2, tmp_path, "bench.ranks", *phases, *TINY, *load, *files)
    measured = {row["phase"]: row for row in found["rows"]}
    assert measured.keys() == {
        *("decode", "prefill", "prefill, busy", "prefill, new", "first, FP8", "served"),
        *("decode, kernels", "prefill, kernels", "first pictures", "interactive"),
    }
    assert found["machine"]["tp_size"] == 2
    speed_ups = {
        (row["phase"], row["batch_size"]): row["speed_up"]
        for row in found["rows"]
        if row["speed_up"] is not None
    }
    (first,) = (row for row in found["rows"] if row["phase"] == "decode" and row["batch_size"] == 1)
    assert speed_ups == {("decode", 1): 5.0 / first["ms"]}
    assert printed.count(" times one\n") == 1
    assert json.loads(output.read_text()) == found
    assert "2 layers, prompt of 40 tokens" in profile.read_text()


@needs_mpi
@pytest.mark.mpi
@pytest.mark.process
def test_sums_of_every_size_are_measured(tmp_path: Path) -> None:
    flags = ("--shape", "tiny", "--num_rows", "1,3")
    found, _ = program(2, tmp_path, "bench.ranks.sums", *flags)
    assert [row["num_rows"] for row in found["rows"]] == [1, 3]
    assert all(row["us"].keys() == {"all-reduce"} for row in found["rows"]), "CPUs have no peers"
    assert all(row["us"]["all-reduce"] > 0 for row in found["rows"])


@needs_mpi
@pytest.mark.mpi
@pytest.mark.process
def test_several_depths_on_ranks_are_refused(tmp_path: Path) -> None:
    words = command(2, "-m", "bench.ranks", "decode", "--layers", "1,2")
    result = finished(words, tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error: --layers 1,2: ranks hold one decoder; give one number") == 1


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    """So that a run that hangs loses its last row alone."""
    output = tmp_path / "rows.json"
    rows = [Row("decode", 8, batch_size, 64, 2.0, 1.0, 1.0, 0.5) for batch_size in (1, 8)]
    report = Report({}, Ceilings(1.0, 1.0, 1.0), output=output, one={("decode", 8, 8, 64): 5.0})

    def measured() -> Any:
        yield rows[0]
        assert [row["batch_size"] for row in json.loads(output.read_text())["rows"]] == [1]
        yield rows[1]

    report.show(measured())
    kept = json.loads(output.read_text())
    assert [row["speed_up"] for row in kept["rows"]] == [None, 2.5]
    assert step_times(output) == {("decode", 8, 1, 64): 2.0, ("decode", 8, 8, 64): 2.0}


def test_one_gpus_rows_are_read_from_its_log_too(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    row = Row("decode", 8, 1, 64, 2.0, 1.0, 1.0, 0.5).to_json()
    log.write_text(f"said\n{json.dumps({'rows': [row]})}\n")
    assert step_times(log) == {("decode", 8, 1, 64): 2.0}


@pytest.mark.parametrize("text", ["", "cut short", '{"rows": 1}', '{"ro'])
def test_what_holds_no_rows_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no rows; expected the --output"):
        step_times(path)
