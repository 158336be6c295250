"""Tensor parallel ranks beside one: the same tokens and logits, and what the reductions cost.

    python -m bench.ranks.tensor_parallel --folder D [--shape 72b|tiny] [--tp_size 2]
        [--device cuda|cpu]

Makes models of random weights in `--folder` (at the 72B model's width two layers and one of the
vision encoder; in float32 with a smaller vocabulary: 65 GB in all), converts them for one rank and
for `--tp_size`, and starts `mpirun` once for each: the ranks answer the same questions as one and
time their decode steps (bench/ranks/tensor_parallel_rank.py). What is in the folder is used again.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from build.conversion.convert import ConvertOptions, convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.planning.device_memory import total_memory_bytes
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint

ROOT = Path(__file__).parents[2]
SHAPES = {
    "72b": replace(PRESETS["72b"], num_hidden_layers=2, vision_num_hidden_layers=1),
    "tiny": replace(PRESETS["tiny"], num_attention_heads=8, num_key_value_heads=4),
}
SMALL_VOCABULARY = 16384
PRECISIONS = {
    "float32": ConvertOptions(quant_algo=None, kv_cache_quant_algo=None, dtype="float32"),
    "FP8": ConvertOptions(calib_size=1),
}
LIMITS = {"max_batch_size": 64, "max_input_len": 2304, "max_seq_len": 2560}
# Open MPI refuses root and ties each rank to one core; MPICH does neither and ignores these.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_engines(
    folder: Path, shape: str, precision: str, sizes: tuple[int, int], device: torch.device
) -> list[Path]:
    """An engine directory for each number of ranks, from one model and one calibration."""
    started = time.perf_counter()
    small = shape == "72b" and precision == "float32"
    model = folder / f"model_{shape}{'_small_vocabulary' if small else ''}"
    chosen = SHAPES[shape]
    if not (model / layout.CONFIG).exists():
        if small:
            chosen = replace(chosen, vocab_size=SMALL_VOCABULARY)
        write_random_checkpoint(model, chosen, device=device.type)
        say(f"{model.name}: {time.perf_counter() - started:.0f} s")
    engines, report = [], None
    for tp_size in sizes:
        name = f"{shape}_{precision}_tp{tp_size}"
        checkpoint, engine = folder / f"checkpoint_{name}", folder / f"engine_{name}"
        options = replace(PRECISIONS[precision], tp_size=tp_size, calib_cache=report)
        if not checkpoint.exists():
            convert(HuggingFaceSource(model), checkpoint, options, device)
        if options.is_quantised:
            report = checkpoint / layout.REPORT
        if not engine.exists():
            build = BuildOptions(decoder="torch", vision="torch", **LIMITS)  # type: ignore[arg-type]
            spec = specify(checkpoint, build, device, total_memory_bytes(device))
            build_engine(spec, engine, build)
        say(f"{engine.name}: {time.perf_counter() - started:.0f} s")
        engines.append(engine)
    return engines


def measure(
    mpirun: str, engines: list[Path], tp_size: int, output: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the ranks found before they ended or the time was up."""
    one, many = map(str, engines)
    output.unlink(missing_ok=True)
    flags = ("--one", one, "--many", many, "--output", str(output), "--device", arguments.device)
    command = [mpirun, "-n", str(tp_size), sys.executable, "-m", "bench.ranks.tensor_parallel_rank"]
    say(f"$ {' '.join([*command, *flags])}")
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env={**OPEN_MPI, **os.environ},
            timeout=arguments.timeout_s,
            check=False,
        )
        ended: object = done.returncode
    except subprocess.TimeoutExpired:
        ended = f"stopped after {arguments.timeout_s} s"
    found = json.loads(output.read_text()) if output.exists() else {}
    return {"exit_code": ended, "seconds": round(time.perf_counter() - started, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="72b")
    parser.add_argument("--tp_size", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--timeout_s", type=float, default=150, help="of each mpirun")
    arguments = parser.parse_args()
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        parser.error("no mpirun in PATH; pip install mpi4py mpich")
    device, sizes = torch.device(arguments.device), (1, arguments.tp_size)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    machine = describe()
    if device.type == "cuda":
        machine |= {
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    result = {"machine": machine, "shape": arguments.shape, "tp_size": arguments.tp_size}
    for precision in arguments.precisions:
        engines = make_engines(arguments.folder, arguments.shape, precision, sizes, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        output = arguments.folder / f"found_{precision}.json"
        result[precision] = measure(mpirun, engines, arguments.tp_size, output, arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
