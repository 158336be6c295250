"""What the doctor says of machines with and without the production packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from nvlm.planning import tensorrt_llm_package
from runtime.doctor import Gpu, examine, lines, targets
from tests.support.command import ROOT

H100 = Gpu("NVIDIA H100 80GB HBM3", 85.0, "9.0")
ADA = Gpu("NVIDIA L40S", 48.0, "8.9")


def found(
    gpus: list[Gpu], installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[str]]:
    """What is missing for each target on a machine with these GPUs and packages."""
    names = {"onnx", "onnxscript", *installed}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    return {target.flag: [each.what for each in target.missing] for target in targets(gpus)}


def ready(gpus: list[Gpu], installed: set[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    return {flag for flag, missing in found(gpus, installed, monkeypatch).items() if not missing}


def test_targets_follow_gpu_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_targets = {"--decoder torch", "--vision torch"}
    everything = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_llm"}
    assert ready([], set(), monkeypatch) == torch_targets
    assert ready([], everything, monkeypatch) == torch_targets | {"--vision onnxruntime"}
    production = {"--decoder tensorrt_llm", "--vision tensorrt"}
    assert ready([H100], {"tensorrt", "tensorrt_llm"}, monkeypatch) == torch_targets | production
    rtx = {"--vision tensorrt_rtx"}
    assert ready([ADA], {"tensorrt_rtx"}, monkeypatch) == torch_targets | rtx


def test_everything_that_is_missing_for_a_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = found([], set(), monkeypatch)
    no_gpu, packages = "torch sees or may use no GPU", ("tensorrt_llm", "tensorrt")
    assert missing["--decoder tensorrt_llm"] == [
        no_gpu,
        *(f"{name} is not installed" for name in packages),
    ]
    assert missing["--vision tensorrt"] == [no_gpu, "tensorrt is not installed"]
    (hopper,) = found([ADA], {"tensorrt", "tensorrt_llm"}, monkeypatch)["--decoder tensorrt_llm"]
    assert "compute capability 8.9" in hopper


def test_another_tensorrt_llm_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorrt", "tensorrt_llm"}
    for version, is_ready in (
        ("1.2.1", True),
        ("1.2.1+cu130", True),
        ("1.2.0", False),
        ("1.3.0rc29", False),
    ):
        monkeypatch.setattr(tensorrt_llm_package, "installed_version", lambda found=version: found)
        assert ("--decoder tensorrt_llm" in ready([H100], installed, monkeypatch)) == is_ready


def test_what_is_missing_comes_with_what_fixes_it() -> None:
    findings = examine()
    assert findings.packages["torch"] == torch.__version__
    printed = "\n".join(lines(findings))
    for target in findings.targets:
        assert target.flag in printed
        for each in target.missing:
            assert f"{each.what}: {each.fix}" in printed


@pytest.mark.process
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
    body = json.loads(done.stdout)["targets"]
    assert len(body) == 6
    missing = {target["flag"]: target["lacks"] for target in body}
    assert missing["--decoder torch"] == []
    for each in missing["--decoder tensorrt_llm"]:
        assert each.keys() == {"missing", "mend"}
