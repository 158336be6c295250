"""Shares of a benchmark: cut at positions of the records, each reports on its own records only, and
never mixed with other shares; what is refused is refused before the engine is loaded."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from evaluation.asking.partition import partition_bounds
from runtime.serving.runner import Runner
from tests.support.benchmarks import (
    Benchmark,
    ocrbench,
    short,
    video_mme,
    write_answers,
    write_json,
)
from tests.support.command import GENERATE, Result, one_line_error, run_command


def run_task(engine_dir: Path, made: Benchmark, prefix: Path, *flags: object) -> Result:
    common = ("--engine_dir", engine_dir, "--device", "cpu", "--output_path", prefix)
    return run_command(*GENERATE, *common, *made.run_flags, "--max_new_tokens", "2", *flags)


def share(partition: int, number: int) -> tuple[object, ...]:
    return ("--num_partitions", number, "--partition_id", partition)


def ids(prefix: Path, partition: int) -> list[int]:
    path = Path(f"{prefix}-OCRBench-dprank=0-partition={partition}.jsonl")
    return sorted(json.loads(line)["sample_id"] for line in path.read_text().splitlines())


def spoil(made: Benchmark, position: int) -> Any:
    """Makes a record of four none, and returns them as they were."""
    records = json.loads(made.gt_paths[0].read_text())
    records.append({**records[0], "question": "Again?"})
    spoiled = [{**r, "type": "Music"} if k == position else r for k, r in enumerate(records)]
    write_json(made.gt_paths[0], spoiled)
    return records


def test_a_bad_record_is_reported_by_its_share_and_corrected_there(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    records = spoil(made, 0)
    prefix = tmp_path / "out"
    first = run_task(float32_engine_dir, made, prefix, *share(0, 2))
    assert first.exit_code == 1
    assert "record 0 has type 'Music'" in first.stderr
    second = run_task(float32_engine_dir, made, prefix, *share(1, 2))
    assert (second.exit_code, "Music" in second.stderr) == (0, False)
    assert [ids(prefix, k) for k in (0, 1)] == [[1], [2, 3]]
    write_json(made.gt_paths[0], records)
    for partition, num_new in ((0, 1), (1, 0)):
        corrected = run_task(float32_engine_dir, made, prefix, *share(partition, 2))
        assert corrected.exit_code == 0, corrected.stderr
        assert f"2 of 2 samples answered, {num_new} of them now" in corrected.stderr
    assert [ids(prefix, k) for k in (0, 1)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("partition", [0, 1, 2])
def test_another_number_of_shares_is_refused_beside_any_answers(
    partition: int, tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    prefix = tmp_path / "out"
    assert run_task(float32_engine_dir, made, prefix, *share(0, 2)).exit_code == 0
    result = run_task(float32_engine_dir, made, prefix, *share(partition, 3))
    one_line_error(result, "made with num_partitions 2 and this run has 3", "choose another --out")
    flags = (*share(0, 2), "--num_samples_per_partition", "1")
    result = run_task(float32_engine_dir, made, prefix, *flags)
    one_line_error(result, "made with num_samples_per_partition 0 and this run has 1")
    assert ids(prefix, 0) == [0]


def test_a_data_set_that_grew_is_not_shared_out_anew(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    prefix = tmp_path / "out"
    assert run_task(float32_engine_dir, made, prefix, *share(1, 2)).exit_code == 0
    assert run_task(float32_engine_dir, made, tmp_path / "whole").exit_code == 0
    records = json.loads(made.gt_paths[0].read_text())
    write_json(made.gt_paths[0], [*records, {**records[0], "question": "Again?"}])
    result = run_task(float32_engine_dir, made, prefix, *share(1, 2))
    one_line_error(result, "made with num_records 3 and this run has 4, which shares the records")
    whole = run_task(float32_engine_dir, made, tmp_path / "whole")
    assert "4 of 4 samples answered, 1 of them now" in whole.stderr


@pytest.mark.parametrize("mistake", ["settings", "line", "frames", "folder", "engine"])
def test_a_mistake_is_reported_before_the_engine_is_loaded(
    mistake: str, tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    flags: tuple[object, ...] = ()
    engine = float32_engine_dir
    if mistake == "settings":
        assert run_task(engine, made, tmp_path / "out").exit_code == 0
        flags, message = ("--max_new_tokens", "9"), "made with max_new_tokens 2 and this run has 9"
    elif mistake == "line":
        write_answers(tmp_path / "out", "OCRBench", [short(99, "?", "?")])
        message = "line 1 is no OCRBench answer to a sample of this partition"
    elif mistake == "frames":
        pytest.importorskip("av")
        made, flags = video_mme(tmp_path / "video"), ("--num_frames", "4")
        message = "asks about 4 images at once and the engine takes 3"
    elif mistake == "folder":
        flags = ("--input_image_path", made.gt_paths[0].parent)
        message = "has none of the 3 files that are asked about, such as"
    else:
        engine, message = tmp_path, "manifest.json"
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    with patch.object(Runner, "open", side_effect=AssertionError("loaded")):
        one_line_error(run_task(engine, made, tmp_path / "out", *flags), message)
    assert {path: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_shares_are_those_of_numpys_linspace() -> None:
    """Only the two edges that count are computed: a record may say a trillion partitions."""
    for num_records in (0, 1, 7, 900, 12_345):
        for number in (1, 2, 3, 7, 64, 1000):
            edges = [int(edge) for edge in np.linspace(0, num_records, number + 1)]
            found = [partition_bounds(num_records, number, k) for k in range(number)]
            assert found == list(pairwise(edges)), (num_records, number)
    assert partition_bounds(5, 10**12, 0) == (0, 0)
