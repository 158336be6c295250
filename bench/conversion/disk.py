"""Conversion at the 72B model's width: speed against a plain copy, and memory against depth.

    python -m bench.conversion.disk disk   --folder D [--repeats N]
    python -m bench.conversion.disk memory --folder D

`folder` needs 45 GB and keeps the random model it makes (full width: hidden size 8192, intermediate
29568, vocabulary 152064, ViT 3200; 6 decoder and 2 vision layers). `disk`: a copy that reads what
the conversion reads and writes as many bytes as it writes, bf16 conversion and FP8 quantisation
with scales at hand (--calib_cache), in turn; every one begins with its input out of the page cache
and ends with its output on the disk. `memory`: calibrated FP8 conversions of 2 and of 6 layers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.conversion.resident_memory import Measured, run_measured
from bench.machine import describe
from nvlm.formats import layout
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "examples" / "coffee.jpg"
LAYERS = (2, 6)
SAMPLES = "one image of 7 tiles, one question, 2,048 tokens and some"
_CHUNK_BYTES = 8 << 20
_LONG_QUESTION = "What is in the cup? " * 40  # with 7 tiles more than one window of 2,048 tokens


def make_models(
    folder: Path, depths: tuple[int, ...] = LAYERS, preset: str = "72b", device: str = "cpu"
) -> dict[int, Path]:
    """Random models by depth; they share their weight files."""
    deepest = max(depths)
    models = {layers: folder / f"model{layers}" for layers in depths}
    if not (models[deepest] / layout.CONFIG).exists():
        shape = replace(PRESETS[preset], num_hidden_layers=deepest, vision_num_hidden_layers=2)
        write_random_checkpoint(models[deepest], shape, device=device)
    for layers, path in models.items():
        if layers != deepest and not path.exists():
            path.mkdir()
            for file in models[deepest].iterdir():
                (path / file.name).symlink_to(file)
            config = json.loads((models[deepest] / layout.CONFIG).read_text())
            config["llm_config"]["num_hidden_layers"] = layers
            (path / layout.CONFIG).unlink()
            (path / layout.CONFIG).write_text(json.dumps(config))
    return models


def convert(model: Path, output: Path, *flags: str) -> Measured:
    command = [sys.executable, "convert_checkpoint.py", "--model_dir", str(model)]
    command += ["--output_dir", str(output), "--overwrite", "--device", "cpu", *flags]
    return run_measured(command, cwd=ROOT)


def input_files(model: Path) -> list[Path]:
    return sorted({path.resolve() for path in model.glob(layout.ANY_WEIGHTS)})


def forget(files: list[Path]) -> None:
    """Writes out what is dirty and drops these files from the page cache."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def copy_seconds(files: list[Path], target: Path, write_bytes: int) -> float:
    """Reads all of `files` and writes `write_bytes` of them, synced."""
    start = time.perf_counter()
    left = write_bytes
    with open(target, "wb", buffering=0) as output:
        os.posix_fallocate(output.fileno(), 0, write_bytes)
        for path in files:
            with open(path, "rb", buffering=0) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    left -= output.write(chunk[:left]) if left else 0
        os.fsync(output.fileno())
    return time.perf_counter() - start


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure_disk(folder: Path, repeats: int) -> dict[str, Any]:
    model = make_models(folder)[max(LAYERS)]
    cache = folder / layout.REPORT
    assert cache.exists(), "run `memory` first: it makes the scales"
    files, output, copied = input_files(model), folder / "output", folder / "copy"
    read_bytes = sum(path.stat().st_size for path in files)
    plain = ("--quant_algo", "none")
    write_bytes = {"bf16": 0, "fp8": 0}
    runs: dict[str, list[float]] = {"copy": [], "bf16": [], "fp8": []}
    cpu: dict[str, list[float]] = {"copy": [], "bf16": [], "fp8": []}
    for repeat in range(repeats):
        for name, flags in (("bf16", plain), ("fp8", ("--calib_cache", str(cache)))):
            forget(files)
            measured = convert(model, output, *flags)
            runs[name].append(measured.seconds)
            cpu[name].append(measured.cpu_seconds)
            write_bytes[name] = size_of(output)
            shutil.rmtree(output)
        forget(files)
        cpu_start = time.process_time()
        runs["copy"].append(copy_seconds(files, copied, write_bytes["bf16"]))
        cpu["copy"].append(time.process_time() - cpu_start)
        copied.unlink()
        for name, times in runs.items():
            text = f"{times[-1]:.1f} s ({cpu[name][-1]:.1f} s of CPU), {repeat + 1} of {repeats}"
            print(f"{name} {text}", file=sys.stderr)
    rates = {name: read_bytes / 1e9 / statistics.median(times) for name, times in runs.items()}
    return {
        "read_bytes": read_bytes,
        "write_bytes": write_bytes,
        "seconds": runs,
        "cpu_seconds": cpu,
        "load_average": os.getloadavg(),
        "read_gb_per_s": rates,
        "bf16_share_of_copy": rates["bf16"] / rates["copy"],
        "fp8_share_of_copy": rates["fp8"] / rates["copy"],
    }


def write_calibration(folder: Path) -> Path:
    """One long sample: SAMPLES says what it is at full width."""
    path = folder / "calibration.jsonl"
    path.write_text(json.dumps({"prompt": _LONG_QUESTION, "image": str(PHOTO)}) + "\n")
    return path


def measure_memory(folder: Path) -> dict[str, Any]:
    calibration = write_calibration(folder)
    found: dict[int, Measured] = {}
    for layers, model in make_models(folder).items():
        output = folder / "output"
        found[layers] = convert(model, output, "--calib_data", str(calibration))
        if layers == max(LAYERS):
            shutil.copy(output / layout.REPORT, folder)
        shutil.rmtree(output)
        gigabytes, seconds = found[layers].peak_bytes / 1e9, found[layers].seconds
        print(f"{layers} layers: {gigabytes:.2f} GB, {seconds:.0f} s", file=sys.stderr)
    few, many = min(LAYERS), max(LAYERS)
    per_layer = (found[many].seconds - found[few].seconds) / (many - few)
    return {
        "peak_bytes": {str(layers): measured.peak_bytes for layers, measured in found.items()},
        "seconds": {str(layers): measured.seconds for layers, measured in found.items()},
        "calibration_samples": SAMPLES,
        "seconds_per_decoder_layer": per_layer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("disk", "memory"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part == "disk":
        result = measure_disk(folder, arguments.repeats)
    else:
        result = measure_memory(folder)
    json.dump({"machine": describe(), **result}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
