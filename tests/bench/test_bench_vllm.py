"""The measurement of vLLM, against a double of its API that knows how long everything takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.peers import vllm_engine
from nvlm.program import command_line
from nvlm.program.errors import UserError
from tests.doubles.vllm import FIXED, LAYER, READ, SUM, TOKEN, VERSION, Calls, Clock, make_vllm
from tests.support.modules import importable

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")

TINY = ["--shape", "tiny", "--layers", "2,6", "--context", "400", "--prompts", "190,300"]
CONTEXT = 400


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """`import vllm` finds the double, and hopper_vllm its clock."""
    calls, clock = Calls(), Clock()
    monkeypatch.setattr(vllm_engine, "time", clock)
    with importable({"vllm": make_vllm(clock, calls)}):
        yield calls


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    vllm_engine.main([*TINY, *arguments])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_steps_and_slopes_are_those_of_the_clock(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 prompts of 300 tokens take several steps, in which the first requests decode already."""
    found = measured(capsys, "--batch_sizes", "1,64")
    decode = {
        (row["num_layers"], row["batch_size"]): row["ms"]
        for row in found["rows"]
        if row["phase"] == "decode"
    }
    for (num_layers, batch_size), ms in decode.items():
        step = FIXED + num_layers * (LAYER + READ * batch_size * CONTEXT)
        assert ms == pytest.approx(1e3 * step, rel=1e-3)
    assert decode.keys() == {(2, 1), (6, 1), (2, 64), (6, 64)}
    slopes = {(row["phase"], row["num_tokens"], row["batch_size"]): row for row in found["slopes"]}
    for num_tokens in (190, 300):
        slope = slopes["prefill", num_tokens, 1]
        assert slope["ms_per_layer"] == pytest.approx(1e3 * (LAYER + TOKEN * num_tokens))
        assert slope["fixed_ms"] == pytest.approx(1e3 * FIXED)
    slope = slopes["decode", CONTEXT, 64]
    assert slope["ms_per_layer"] == pytest.approx(1e3 * (LAYER + READ * 64 * CONTEXT), rel=1e-3)
    assert len(slopes) == 4


def test_several_gpus_are_vllms_own_to_start(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row's rate is of one GPU, which reads a half of the weights."""
    one, two = (measured(capsys, "--batch_sizes", "1", "--tp_size", str(n)) for n in (1, 2))
    assert [arguments["tensor_parallel_size"] for _, arguments in calls.engines] == [1, 1, 2, 2]
    assert (one["machine"]["tp_size"], two["machine"]["tp_size"]) == (1, 2)
    for alone, halved in zip(one["rows"], two["rows"], strict=True):
        layers = 1e3 * halved["num_layers"]
        expected = 1e3 * FIXED + (alone["ms"] - 1e3 * FIXED) / 2 + SUM * layers
        assert halved["ms"] == pytest.approx(expected, rel=1e-3)
        assert halved["rate"] * halved["ms"] < 0.6 * alone["rate"] * alone["ms"]


def test_engines_are_asked_in_turns_as_often_as_the_flag_says(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(capsys, "--batch_sizes", "3")
    rounds = vllm_engine.WARM_UP + vllm_engine.REPEATS
    prefill = [
        (layers, 1, length, 1) for length in (190, 300) for _ in range(rounds) for layers in (2, 6)
    ]
    assert calls.generated[: len(prefill)] == prefill
    decode = calls.generated[len(prefill) :]
    assert [layers for layers, *_ in decode] == [2, 2, 6, 6] * rounds
    for (_, _, prompt, less), (_, batch_size, _, more) in zip(
        decode[::2], decode[1::2], strict=True
    ):
        assert batch_size == 3
        assert more - less == vllm_engine.NUM_STEPS
        assert prompt + (less + more) // 2 == CONTEXT


def test_engines_have_random_fp8_weights_graphs_and_no_prefix_cache(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(capsys, "--batch_sizes", "1,8", "--kv_cache_dtype", "fp8")
    assert [num_layers for num_layers, _ in calls.engines] == [2, 6]
    for _, arguments in calls.engines:
        assert arguments["load_format"] == "dummy"
        assert arguments["quantization"] == "fp8"
        assert arguments["kv_cache_dtype"] == "fp8"
        assert not arguments["enable_prefix_caching"]
        assert not arguments["enforce_eager"]
        assert arguments["max_num_seqs"] == 8
        assert arguments["config"]["hidden_size"] == 256
        assert arguments["config"]["intermediate_size"] == 512
    assert sum(arguments["gpu_memory_utilization"] for _, arguments in calls.engines) < 0.95


def test_the_json_is_the_last_line_and_of_the_same_form(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines' processes may print when they end."""
    vllm_engine.main([*TINY, "--batch_sizes", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines.count("the engine's process has ended") == 2
    found = json.loads(last)
    assert found.keys() == {"machine", "ceilings", "rows", "slopes"}
    assert found["machine"]["vllm"] == VERSION
    assert found["machine"]["kv_cache_dtype"] == "auto"
    assert all(row["rate"] > 0 and row["share"] > 0 for row in found["rows"])


def test_without_vllm_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hopper_vllm"])
    with importable({"vllm": None}), pytest.raises(SystemExit) as ended:
        command_line.run(vllm_engine.main)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: vllm cannot be imported")


def test_a_context_with_no_room_for_a_prompt_is_refused(calls: Calls) -> None:
    with pytest.raises(UserError, match="--context 80 leaves no prompt; give 82 or more"):
        vllm_engine.main(["--context", "80", "--batch_sizes", "1"])
    assert calls.engines == []
