"""The benchmark of preparing threads beside a decoder's: rows for each picture and thread count."""

from __future__ import annotations

import json

import pytest

from bench.cpu import preparing
from nvlm.inputs.picture_budget import PictureBudget


def test_rows_of_each_picture_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparing, "SIZES", {"a small one": (200, 100)})
    monkeypatch.setattr("sys.argv", ["preparing", "--threads", "1", "2", "--seconds", "0.1"])
    preparing.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["picture"], row["threads"]) for row in found["rows"]] == [
        *(("a small one", number) for number in (1, 2)),
        *(("a small one, turned", number) for number in (1, 2)),
    ]
    for row in found["rows"]:
        assert row["pictures_per_s"] > 0.0
        assert row["cpu_ms"] > 0.0
        assert row["late_ms"].keys() == {"p50", "p90", "p99"}


def test_a_picture_is_read_as_the_server_reads_it() -> None:
    bodies = [preparing.body_of(size) for size in ((64, 64), (64, 64), (96, 64))]
    keys = [preparing.prepare(body, PictureBudget()) for body in bodies]
    assert keys[0] == keys[1] != keys[2]
