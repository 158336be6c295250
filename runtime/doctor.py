"""What is installed here, which targets can be built and run, and what to install for the others.

python -m runtime.doctor [--json] [DIR ...]
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.manifest import Kind, is_ours, read_manifest
from nvlm.formats.scale_dtype import scale_dtype, what_differs
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.targets import (
    Decoder,
    Machine,
    Missing,
    Vision,
    compute_capability,
    missing_for_decoder,
    missing_for_vision,
)
from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir

_DISTRIBUTIONS = (
    *("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx"),
    *("tensorrt_llm", "mpi4py", "triton"),
)
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str  # as CUDA has it
    memory_gb: float  # 10^9 bytes
    compute_capability: str  # as "9.0"


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine may be built for."""

    flag: str  # of build_engine.py, with its value
    missing: list[Missing]  # everything that keeps it from being built and run here


@dataclass(frozen=True, slots=True)
class Directory:
    """A checkpoint or an engine."""

    path: str  # as the user gave it
    kind: Kind  # checkpoint or engine
    scale_dtype: str | None  # what its linears' scales are numbers of; None: they have none
    kv_cache: str  # what keys and values are held in
    warning: str | None  # what follows where an older version wrote the scales

    @classmethod
    def read(cls, path: Path) -> Directory:
        """Raises `UserError` for a directory that is neither, unfinished or damaged."""
        kind: Kind = "checkpoint" if is_ours(path, "checkpoint") else "engine"
        if not (path / layout.MANIFEST).is_file():
            raise UserError(
                f"{path} has no {layout.MANIFEST}, expected a finished checkpoint or engine; "
                "convert or build it to the end"
            )
        if kind == "checkpoint":
            read_manifest(path, kind)  # refuses what is unfinished or damaged
            config = CheckpointConfig.read(path / layout.CONFIG)
            found = scale_dtype(path, config)
        else:
            engine = EngineDir.read(path)
            config, found = engine.checkpoint_config, engine.scale_dtype()
        warning = what_differs(path, found, config)
        return cls(str(path), kind, found, config.kv_cache_name, warning)

    def line(self) -> str:
        scales = f"scales in {self.scale_dtype}" if self.scale_dtype else "linears without scales"
        text = f"{self.kind} {self.path}: {scales}, KV cache {self.kv_cache}"
        return f"{self.warning} (KV cache {self.kv_cache})" if self.warning else text


@dataclass(frozen=True, slots=True)
class Findings:
    python: str  # its version
    memory_gb: float  # 10^9 bytes
    driver: str | None  # version of NVIDIA's; None: there is none
    gpus: list[Gpu]  # in CUDA's order
    packages: dict[str, str | None]  # versions by distribution; None: not installed
    targets: list[Target]  # in the order of build_engine.py's flags
    directories: list[Directory]  # those asked about


def examine(directories: Sequence[Path] = ()) -> Findings:
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    return Findings(
        python=platform.python_version(),
        memory_gb=round(total_memory_bytes(torch.device("cpu")) / 1e9, 1),
        driver=_driver(),
        gpus=gpus,
        packages={name: _version(name) for name in _DISTRIBUTIONS},
        targets=targets(gpus),
        directories=[Directory.read(path) for path in directories],
    )


def targets(gpus: list[Gpu]) -> list[Target]:
    machine = Machine(tuple(gpu.compute_capability for gpu in gpus))
    return [
        *(
            Target(f"--decoder {name}", missing_for_decoder(name, machine))
            for name in get_args(Decoder)
        ),
        *(
            Target(f"--vision {name}", missing_for_vision(name, machine))
            for name in get_args(Vision)
        ),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    memory_gb = round(properties.total_memory / 1e9, 1)
    return Gpu(properties.name, memory_gb, compute_capability(index))


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
    printed = [f"Python {findings.python}, {findings.memory_gb} GB memory, {driver}"]
    printed += [f"GPU {i}: {gpu}" for i, gpu in enumerate(gpus)] or ["no GPU that torch sees"]
    printed += ["packages", *packages, "targets of build_engine.py"]
    for target in findings.targets:
        printed.append(f"  {target.flag:<24}{'no' if target.missing else 'ready'}")
        printed += [f"    {each.what}: {each.fix}" for each in target.missing]
    if findings.directories:
        printed += ["directories", *(f"  {each.line()}" for each in findings.directories)]
    return printed


def to_json(findings: Findings) -> dict[str, Any]:
    """As `--json` prints it. Its keys `lacks` and `mend` stay as scripts know them."""
    values = asdict(findings)
    for target in values["targets"]:
        target["lacks"] = [
            {"missing": each["what"], "mend": each["fix"]} for each in target.pop("missing")
        ]
    return values


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0], "python -m runtime.doctor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "directories", type=Path, nargs="*", metavar="DIR", help="a checkpoint or an engine"
    )
    arguments = parser.parse_args()
    findings = examine(arguments.directories)
    if arguments.json:
        print(json.dumps(to_json(findings)))
    else:
        print("\n".join(lines(findings)))


if __name__ == "__main__":
    run(main)
