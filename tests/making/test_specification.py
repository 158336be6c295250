"""What `auto` chooses for an engine, and why it says so."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from build.engines.specification import BuildOptions, specify
from nvlm.program.errors import UserError
from tests.conftest import CPU, MEMORY_BYTES

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "memory_bytes", "precision", "vision", "reason"),
    [
        (CPU, MEMORY_BYTES, None, "onnxruntime", "at most half"),
        (CPU, 1_000_000, None, "torch", "more than half"),
        (CPU, MEMORY_BYTES, "FP8", "torch", "does not run FP8"),
        (CUDA, MEMORY_BYTES, None, "torch", "runs on cuda"),
    ],
)
def test_auto_takes_onnx_runtime_unless_something_speaks_against_it(
    checkpoint_dir: Path,
    caplog: pytest.LogCaptureFixture,
    device: torch.device,
    memory_bytes: int,
    precision: str | None,
    vision: str,
    reason: str,
) -> None:
    with caplog.at_level(logging.INFO):
        options = BuildOptions(vision_precision=precision)
        spec = specify(checkpoint_dir, options, device, memory_bytes)
    assert spec.vision == vision
    assert f"vision: {vision} (" in caplog.text
    assert reason in caplog.text


def test_without_onnx_packages_auto_is_torch_and_asking_for_it_is_refused(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxruntime" else find(name, *rest),
    )
    with caplog.at_level(logging.INFO):
        spec = specify(checkpoint_dir, BuildOptions(), CPU, MEMORY_BYTES)
    assert spec.vision == "torch"
    assert "vision: torch (onnxruntime is not installed)" in caplog.text
    with pytest.raises(UserError, match="onnxruntime is not installed: pip install onnxruntime"):
        specify(checkpoint_dir, BuildOptions(vision="onnxruntime"), CPU, MEMORY_BYTES)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        (BuildOptions(vision="torch"), "bfloat16"),
        (BuildOptions(vision="onnxruntime"), "float32"),
        (BuildOptions(vision="torch", vision_precision="FP8"), "FP8"),
    ],
)
def test_the_default_precision_is_the_checkpoints_and_float32_for_onnx_runtime(
    checkpoint_dir: Path, options: BuildOptions, precision: str
) -> None:
    assert specify(checkpoint_dir, options, CPU, MEMORY_BYTES).vision_precision == precision


@pytest.mark.parametrize(("batch", "num_tiles"), [(1, 7), (4, 28), (8, 56), (64, 56)])
def test_a_vision_pass_holds_an_image_for_each_request_of_a_batch_up_to_56_tiles(
    checkpoint_dir: Path, batch: int, num_tiles: int
) -> None:
    """As docs/hopper.md says."""
    options = BuildOptions(vision="torch", max_batch_size=batch)
    assert specify(checkpoint_dir, options, CPU, MEMORY_BYTES).max_num_tiles == num_tiles
