"""A benchmark run killed at any moment: the same command resumes, and nothing is lost or twice."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

from tests.support.benchmarks import Benchmark, ocrbench, write_json
from tests.support.command import GENERATE, Background, background

NUM_SAMPLES = 60
NUM_KILLS = 3


def long_benchmark(folder: Path) -> Benchmark:
    """OCRBench's three pictures, asked about in different words."""
    made = ocrbench(folder)
    records = json.loads(made.gt_paths[0].read_text())
    write_json(
        made.gt_paths[0],
        [
            {**records[number % 3], "question": f"Question {number}: what is written there?"}
            for number in range(NUM_SAMPLES)
        ],
    )
    return made


def start(engine_dir: Path, made: Benchmark, prefix: Path) -> Background:
    common = ("--engine_dir", engine_dir, "--device", "cpu", "--output_path", prefix)
    flags = (*common, *made.run_flags, "--max_new_tokens", "4")
    return background(*GENERATE, *flags, log=prefix.with_suffix(".log"))


def answers_of(prefix: Path) -> Path:
    return Path(f"{prefix}-OCRBench-dprank=0-partition=0.jsonl")


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path: Path, number: int, running: Background) -> None:
    """Or the end of the run."""
    end = time.monotonic() + 60
    while num_lines(path) < number and running.process.exitcode is None:
        assert time.monotonic() < end, "no answer came"
        time.sleep(0.001)


def test_killed_at_random_moments_a_run_answers_every_sample_once(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = long_benchmark(tmp_path)
    whole, prefix = tmp_path / "whole", tmp_path / "killed"
    result = start(float32_engine_dir, made, whole).wait()
    assert result.exit_code == 0, result.stderr
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    path, killed_after = answers_of(prefix), [0]
    for _ in range(NUM_KILLS):
        running = start(float32_engine_dir, made, prefix)
        wait_for_lines(path, killed_after[-1] + chance.randint(0, NUM_SAMPLES // 6), running)
        time.sleep(chance.random() * 0.02)
        running.kill(signal.SIGKILL)
        assert running.wait().exit_code in (-signal.SIGKILL, 0)
        killed_after.append(num_lines(path))
    assert killed_after == sorted(killed_after), f"seed {seed}: answers were lost"
    result = start(float32_engine_dir, made, prefix).wait()
    assert result.exit_code == 0, result.stderr
    message = f"seed {seed}, killed after {killed_after} answers"
    assert f"{NUM_SAMPLES} of {NUM_SAMPLES} samples answered" in result.stderr, message
    lines, expected = (answers_of(place).read_text().splitlines() for place in (prefix, whole))
    ids = [json.loads(line)["sample_id"] for line in lines]
    assert sorted(ids) == list(range(NUM_SAMPLES)), message
    assert sorted(lines) == sorted(expected), message
