"""A flag given twice: several values collect, and no question is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

import convert_checkpoint
import evaluate
import run
from nvlm.program.command_line import ArgumentParser
from nvlm.program.errors import UserError

RUN = ["--engine_dir", "E", "--prompt", "q"]
GENERATE = ["generate", "--engine_dir", "E", "--task", "ChartQA"]


def test_flags_of_several_values_collect_in_order() -> None:
    words = ["--image", "a", "b", "--stop", "x", "--image", "c", "--stop", "y", "z"]
    given = run.parser().parse_args([*RUN, *words])
    assert list(map(str, given.image)) == ["a", "b", "c"]
    assert given.stop == ["x", "y", "z"]
    given = evaluate.parser().parse_args([*GENERATE, "--gt_path", "a", "--gt_path", "b", "c"])
    assert given.gt_path == [Path("a"), Path("b"), Path("c")]
    tasks = ["score", "--input_path", "p", "--task", "ChartQA", "--task", "DocVQA"]
    assert evaluate.parser().parse_args(tasks).task == ["ChartQA", "DocVQA"]
    runs = ["score", "--input_path", "p", "--compare", "a", "b", "--compare", "c"]
    assert evaluate.parser().parse_args(runs).compare == [Path("a"), Path("b"), Path("c")]


def test_a_second_parse_begins_anew() -> None:
    parser = run.parser()
    for name in ("a", "b"):
        given = parser.parse_args(["--engine_dir", "E", "--prompt", name, "--image", name])
        assert (given.prompt, list(map(str, given.image))) == (name, [name])


@pytest.mark.parametrize(
    ("parser", "words", "message"),
    [
        (run.parser, [*RUN, "--prompt", "r"], "--prompt is given twice, with 'q' and 'r'"),
        (run.parser, ["--input_file", "a", "--input_file=b"], "--input_file is given twice"),
        (run.parser, [*RUN, "--system", "a", "--system", "b"], "--system is given twice"),
        (
            evaluate.parser,
            ["score", "--input_path", "p", "--gt_path", "a", "--gt_path", "b"],
            "--gt_path is given twice, with 'a' and 'b'; give it once",
        ),
        (convert_checkpoint.parser, ["--calib_data", "a", "--calib_data", "b"], "given twice"),
        (run.parser, [*RUN, "--page", "1", "--page", "2"], "--page is given twice, with '1' and"),
        (run.parser, [*RUN, "--compare", "a", "--compare", "b"], "--compare is given twice"),
        (evaluate.parser, [*GENERATE, "--task", "DocVQA"], "twice, with 'ChartQA' and 'DocVQA'"),
        (
            evaluate.parser,
            ["score", "--input_path", "a", "--input_path", "b"],
            "--input_path is given twice",
        ),
    ],
    ids=["prompt", "file", "system", "score", "convert", "page", "compare", "task", "scored"],
)
def test_a_second_question_is_refused(
    parser: type[ArgumentParser], words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parser().parse_args(words)


def test_the_same_value_twice_loses_nothing() -> None:
    assert run.parser().parse_args([*RUN, "--prompt", "q", "--json", "--json"]).prompt == "q"


def test_a_setting_can_be_overridden_after_a_script_that_sets_it() -> None:
    words = ["--seed", "1", "--device", "cpu", "--seed", "2", "--device", "cuda"]
    given = run.parser().parse_args([*RUN, *words, "--engine_dir", "F"])
    assert (given.seed, given.device, given.engine_dir) == (2, "cuda", Path("F"))
