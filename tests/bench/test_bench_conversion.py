"""The benchmark of conversion on a GPU, on the CPU and on models of no size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
