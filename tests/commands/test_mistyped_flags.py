"""Flags that are mistyped, and numbers that are none: refused with what helps."""

from __future__ import annotations

import pytest

import build_engine
import convert_checkpoint
import evaluate
import run
from frontends.triton import serve
from nvlm.program.command_line import ArgumentParser
from nvlm.program.errors import UserError


@pytest.mark.parametrize(
    ("parser", "flag", "word", "expected"),
    [
        (run.parser, "--temperature", "warm", "a number; give one, as in --temperature 0.5"),
        (run.parser, "--top_p", "", "a number"),
        (run.parser, "--top_k", "1.5", "a whole number; give one, as in --top_k 1"),
        (run.parser, "--seed", "1e3", "a whole number"),
        (run.parser, "--max_new_tokens", "0", "a positive integer; give one, as in --max_new_"),
        (run.parser, "--max_num_tiles", "six", "a positive integer"),
        (run.parser, "--max_image_pixels", "2e8", "a positive integer"),
        (run.parser, "--kv_cache_free_gpu_memory_fraction", "1.5", "a number between 0 and 1"),
        (run.parser, "--max_step_ms", "-1", "a number from 0; give one, as in --max_step_ms 0"),
        (convert_checkpoint.parser, "--calib_size", "-1", "a positive integer"),
        (build_engine.parser, "--max_batch_size", "8k", "a positive integer"),
        (serve.parser, "--http_port", "http", "a positive integer"),
        (serve.parser, "--startup_timeout_s", "5s", "a positive number"),
        (serve.parser, "--startup_timeout_s", "inf", "a positive number"),
    ],
)
def test_what_is_no_number_is_reported_with_what_fixes_it(
    parser: type[ArgumentParser], flag: str, word: str, expected: str
) -> None:
    with pytest.raises(UserError) as refused:
        parser().parse_args([f"{flag}={word}"])
    assert f"{flag} is {word!r}, expected {expected}" in str(refused.value)


@pytest.mark.parametrize("word", ["-1", "one"])
def test_so_is_one_of_a_subcommand(word: str) -> None:
    words = ["generate", "--engine_dir", "E", "--task", "ChartQA", f"--partition_id={word}"]
    with pytest.raises(UserError, match=f"--partition_id is '{word}', expected a whole number fr"):
        evaluate.parser().parse_args(words)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--images", "a.png"], "--image"),
        (["--max-new-tokens", "5"], "--max_new_tokens"),
        (["--max_tokens=5"], "--max_new_tokens"),
        (["--Temperature", "1"], "--temperature"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_one_that_may_be_meant(
    words: list[str], meant: str
) -> None:
    with pytest.raises(UserError, match=rf"^unrecognized arguments: .*; did you mean '{meant}'\?"):
        run.parser().parse_args(["--engine_dir", "E", "--prompt", "q", *words])


def test_so_is_an_unknown_flag_of_a_subcommand() -> None:
    words = ["generate", "--engine_dir", "E", "--task", "ChartQA", "--gt-path", "a"]
    with pytest.raises(UserError, match="did you mean '--gt_path'"):
        evaluate.parser().parse_args(words)
    with pytest.raises(UserError, match=r"^unrecognized arguments: x; see --help$"):
        evaluate.parser().parse_args([*words[:5], "x"])
