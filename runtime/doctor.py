"""What is installed here, which targets can be built and run, and what to install for the others.

python -m runtime.doctor [--json]
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nvlm import tensorrt_llm_package, tensorrt_package
from nvlm.command_line import ArgumentParser, run
from nvlm.memory import total_memory_bytes

_DISTRIBUTIONS = (
    *("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx"),
    *("tensorrt_llm", "mpi4py", "triton"),
)
_HOPPER = (9, 0)
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_gb: float
    compute_capability: str


@dataclass(frozen=True, slots=True)
class Target:
    """missing: what keeps it from running here; mend: what to do about it."""

    flag: str
    missing: str | None = None
    mend: str | None = None

    @property
    def is_ready(self) -> bool:
        return self.missing is None


@dataclass(frozen=True, slots=True)
class Findings:
    python: str
    memory_gb: float
    driver: str | None
    gpus: list[Gpu]
    packages: dict[str, str | None]
    targets: list[Target]


def examine() -> Findings:
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    return Findings(
        python=platform.python_version(),
        memory_gb=round(total_memory_bytes(torch.device("cpu")) / 1e9, 1),
        driver=_driver(),
        gpus=gpus,
        packages={name: _version(name) for name in _DISTRIBUTIONS},
        targets=targets(gpus),
    )


def targets(gpus: list[Gpu]) -> list[Target]:
    """Every target, ready or with the first thing it lacks."""
    has_export = all(map(_is_installed, ("onnx", "onnxscript")))
    export = ("onnx or onnxscript is not installed", "pip install onnx onnxscript")
    return [
        Target("--decoder torch"),
        _first(
            "--decoder tensorrt_llm",
            _no_gpu(gpus),
            _not_hopper(gpus),
            _no_tensorrt_llm(),
        ),
        Target("--vision torch"),
        _first(
            "--vision onnxruntime",
            None if has_export else export,
            None
            if _is_installed("onnxruntime")
            else ("onnxruntime is not installed", "pip install onnxruntime"),
        ),
        _first(
            "--vision tensorrt",
            _no_gpu(gpus),
            _not_installed("tensorrt"),
            None if has_export else export,
        ),
        _first(
            "--vision tensorrt_rtx",
            _not_installed("tensorrt_rtx"),
            None if has_export else export,
            None
            if gpus and not _any_hopper(gpus)
            else (
                "it runs on RTX GPUs only (Turing to Blackwell, not Hopper)",
                "build here for one of those with --compute_capability, and run there",
            ),
        ),
    ]


Lack = tuple[str, str] | None


def _first(flag: str, *lacks: Lack) -> Target:
    lack = next((lack for lack in lacks if lack is not None), None)
    return Target(flag) if lack is None else Target(flag, *lack)


def _no_gpu(gpus: list[Gpu]) -> Lack:
    return None if gpus else ("torch sees no GPU", "run on the GPU it is for")


def _any_hopper(gpus: list[Gpu]) -> bool:
    return any(gpu.compute_capability == "{}.{}".format(*_HOPPER) for gpu in gpus)


def _not_hopper(gpus: list[Gpu]) -> Lack:
    if _any_hopper(gpus):
        return None
    return ("FP8 engines of this project are for Hopper", "run on an H100, H200 or GH200")


def _no_tensorrt_llm() -> Lack:
    if not tensorrt_llm_package.is_installed():
        return ("tensorrt_llm is not installed", tensorrt_llm_package.INSTALL)
    version = _version(tensorrt_llm_package.PACKAGE)
    if version is not None and not tensorrt_llm_package.is_supported(version):
        found = f"tensorrt_llm {version} is installed, the engine workflow ended with 1.2"
        return (found, tensorrt_llm_package.INSTALL)
    return None


def _not_installed(package: str) -> Lack:
    if tensorrt_package.is_installed(package):
        return None
    return (f"{package} is not installed", tensorrt_package.INSTALL[package])


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = torch.cuda.get_device_capability(index)
    return Gpu(
        properties.name, round(properties.total_memory / 1e9, 1), "{}.{}".format(*capability)
    )


def _driver() -> str | None:
    try:
        text = _DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found.group(1) if found else None


def lines(findings: Findings) -> list[str]:
    gpus = [
        f"{gpu.name}, {gpu.memory_gb} GB, compute capability {gpu.compute_capability}"
        for gpu in findings.gpus
    ]
    driver = f"NVIDIA driver {findings.driver}" if findings.driver else "no NVIDIA driver"
    packages = [f"  {name:<14}{version or '-'}" for name, version in findings.packages.items()]
    told = [f"Python {findings.python}, {findings.memory_gb} GB memory, {driver}"]
    told += [f"GPU {i}: {gpu}" for i, gpu in enumerate(gpus)] or ["no GPU that torch sees"]
    told += ["packages", *packages, "targets of build_engine.py"]
    for target in findings.targets:
        state = "ready" if target.is_ready else f"no: {target.missing}; {target.mend}"
        told.append(f"  {target.flag:<24}{state}")
    return told


def main() -> None:
    parser = ArgumentParser(__doc__ or "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    findings = examine()
    if parser.parse_args().json:
        print(json.dumps(asdict(findings)))
    else:
        print("\n".join(lines(findings)))


if __name__ == "__main__":
    run(main)
