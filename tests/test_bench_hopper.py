"""The programs that measure on a GPU run on a CPU too, at a tiny size and without meaning."""

from __future__ import annotations

import json

import pytest
import torch

from bench import hopper_kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_every_kernel_is_measured_for_every_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    hopper_kernels.main(["--shape", "tiny", "--batch_sizes", "1,3", "--context", "70"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["copy_bytes_per_s"] > 0
    names = {(row["batch_size"], row["kernel"]) for row in found["kernels"]}
    for kernel in ("add_rms_norm", "paged_attention", "down streaming_linear"):
        assert {(1, kernel), (3, kernel)} <= names
    assert all(row["ms"] > 0 and row["bytes"] > 0 for row in found["kernels"])
