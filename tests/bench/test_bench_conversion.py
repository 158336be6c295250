"""The benchmarks of conversion, on the CPU and on models of no size."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.conversion import disk
from bench.conversion.disk import output_formats
from bench.conversion.gpu import compare_linear, nearest_e4m3
from tests.conftest import CPU
from tests.reference import fp8_e4m3
from tests.support.command import ROOT
from tests.support.tolerances import FP8_LINEAR


def test_the_sampled_linear_is_as_the_report_says(model_dir: Path, checkpoint_dir: Path) -> None:
    found = compare_linear(model_dir, checkpoint_dir, 1, CPU)
    assert found["values_not_the_nearest"] == 0
    scale = found["weights_scaling_factor"]
    assert scale == float(torch.tensor(scale).bfloat16()), "a number of the checkpoint's dtype"
    assert 1 <= scale / found["amax_over_448"] < 1 + 2**-7, "the next one that is not smaller"
    assert found["weight_error"] == pytest.approx(found["weight_error_in_report"], rel=1e-5)
    assert 0.01 < found["output_error"] <= FP8_LINEAR
    assert found["output_error_in_float32"] == pytest.approx(found["output_error"], rel=1e-5)


def test_a_value_that_is_not_the_nearest_is_counted(
    model_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_dir, damaged)
    path = damaged / "rank0.safetensors"
    tensors = load_file(path)
    values = tensors["transformer.layers.1.mlp.proj.weight"].view(torch.uint8)
    values[0, :3] ^= 1  # to a neighbour
    save_file(tensors, path, {"format": "pt"})
    assert compare_linear(model_dir, damaged, 1, CPU)["values_not_the_nearest"] == 3


def test_nearest_is_that_of_the_definition() -> None:
    x = torch.linspace(-500, 500, 100_003, dtype=torch.float64)
    expected = fp8_e4m3.dequantize(fp8_e4m3.quantize(x.numpy(), 1.0), 1.0)
    assert torch.equal(nearest_e4m3(x), torch.from_numpy(expected))


@pytest.mark.process
@pytest.mark.slow
def test_it_runs_and_keeps_what_it_has_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.conversion.gpu", "--folder", str(tmp_path / "models")]
    flags = ("--preset", "tiny", "--depths", "1", "2", "--device", "cpu")
    results = ("--results", str(tmp_path / "results.json"))
    done = subprocess.run(
        [*command, *flags, *results], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["peak_bytes"].keys() == found["seconds"].keys() == {"1", "2"}
    assert found["seconds_with_scales_at_hand"].keys() == {"1", "2"}
    assert found["against_float64"]["values_not_the_nearest"] == 0
    assert not (tmp_path / "models" / "output").exists()


def run_disk(part: str, folder: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.conversion.disk", part, "--folder", str(folder)]
    command += ["--preset", "tiny", "--depths", "1", "2", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.process
@pytest.mark.slow
def test_each_format_is_measured_beside_its_copy_and_the_plan(tmp_path: Path) -> None:
    formats = ("--output_format", "trtllm,compressed-tensors")
    memory = run_disk("memory", tmp_path, *formats)
    for name in ("trtllm", "compressed-tensors"):
        assert memory["peak_bytes"][name].keys() == memory["seconds"][name].keys() == {"1", "2"}
    names = {"trtllm bf16", "trtllm fp8", "compressed-tensors fp8"}
    disk = run_disk("disk", tmp_path, *formats, "--repeats", "1")
    assert disk["share_of_copy"].keys() == disk["peak_bytes"].keys() == names
    assert disk["seconds"].keys() == names | {"trtllm copy", "compressed-tensors copy"}
    written = disk["write_bytes"]
    assert written["trtllm copy"] == max(written["trtllm bf16"], written["trtllm fp8"])
    assert written["compressed-tensors copy"] == written["compressed-tensors fp8"]
    assert 0 < disk["planned_bytes"] < memory["planned_bytes"]
    assert not (tmp_path / "output").exists()
    assert not (tmp_path / "copy").exists()


def test_a_format_that_the_converter_has_not_is_refused() -> None:
    assert output_formats("modelopt,trtllm") == ["modelopt", "trtllm"]
    with pytest.raises(argparse.ArgumentTypeError, match="'gguf' is none of trtllm"):
        output_formats("trtllm,gguf")


def test_depths_that_do_not_rise_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    words = ["disk", "memory", "--folder", str(folder), "--depths", "4", "4"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        disk.main()
    assert ended.value.code == 2
    assert "--depths is 4 4, expected rising numbers; give two" in capsys.readouterr().err
    assert not folder.exists()
