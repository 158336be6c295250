"""What the doctor says of machines with and without the production packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from runtime import doctor
from runtime.doctor import Gpu, examine, lines, targets
from tests.command import ROOT

H100 = Gpu("NVIDIA H100 80GB HBM3", 85.0, "9.0")
ADA = Gpu("NVIDIA L40S", 48.0, "8.9")


def ready(gpus: list[Gpu], installed: set[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    found = {"onnx", "onnxscript", *installed}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    return {target.flag for target in targets(gpus) if target.is_ready}


def test_targets_follow_gpu_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_targets = {"--decoder torch", "--vision torch"}
    everything = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_llm"}
    assert ready([], set(), monkeypatch) == torch_targets
    assert ready([], everything, monkeypatch) == torch_targets | {"--vision onnxruntime"}
    production = {"--decoder tensorrt_llm", "--vision tensorrt"}
    assert ready([H100], {"tensorrt", "tensorrt_llm"}, monkeypatch) == torch_targets | production
    rtx = {"--vision tensorrt_rtx"}
    assert ready([ADA], {"tensorrt_rtx"}, monkeypatch) == torch_targets | rtx


def test_a_tensorrt_llm_without_the_engine_workflow_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"tensorrt", "tensorrt_llm"}
    for version, is_ready in (("1.2.1", True), ("1.3.0rc29", False)):
        monkeypatch.setattr(doctor, "_version", lambda name, found=version: found)
        assert ("--decoder tensorrt_llm" in ready([H100], installed, monkeypatch)) == is_ready


def test_what_is_missing_comes_with_what_mends_it() -> None:
    findings = examine()
    assert findings.packages["torch"] == torch.__version__
    for target in findings.targets:
        assert (target.missing is None) == (target.mend is None)
    told = "\n".join(lines(findings))
    for flag in ("--decoder tensorrt_llm", "--vision tensorrt_rtx", "--decoder torch"):
        assert flag in told


def test_it_runs_as_a_module_and_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runtime.doctor", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    flags = [target["flag"] for target in json.loads(done.stdout)["targets"]]
    assert len(flags) == 6
