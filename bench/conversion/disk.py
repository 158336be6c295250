"""Conversion at the 72B model's width: speed against a plain copy, and memory against depth.

    python -m bench.conversion.disk disk   --folder D [--repeats N]
    python -m bench.conversion.disk memory --folder D
        [--output_format trtllm,modelopt,compressed-tensors] [--depths 2 6]

`folder` needs 45 GB and keeps the random model it makes (full width: hidden size 8192, intermediate
29568, vocabulary 152064, ViT 3200; 6 decoder and 2 vision layers). `disk`: for each format a copy
that reads what the conversion reads and writes as many bytes as it writes, FP8 quantisation with
scales at hand (--calib_cache) and, for trtllm, bf16 conversion, in turn; every one begins with its
input out of the page cache and ends with its output on the disk. trtllm's copy writes as much as
bf16. `memory`: calibrated FP8 conversions of 2 and of 6 layers, beside what --dry_run plans.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.conversion.resident_memory import Measured, run_measured
from bench.machine import describe
from build.conversion.convert import ConvertOptions
from build.conversion.plan import peak_memory_bytes
from build.exports.choose import OUTPUT_FORMATS, TRTLLM
from build.sources.detect import read_config
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


def planned_bytes(model: Path, *, is_calibrated: bool) -> int:
    """The converter's own memory in its plan: of any format, with any number of layers."""
    config = read_config(model)
    return peak_memory_bytes(config, ConvertOptions().config(config), is_calibrated=is_calibrated)


def conversions(output_format: str, cache: Path) -> dict[str, tuple[str, ...]]:
    """Flags of the conversions to a format, by name. Exports are FP8 alone."""
    flags = ("--output_format", output_format)
    found: dict[str, tuple[str, ...]] = {}
    if output_format == TRTLLM:
        found[f"{output_format} bf16"] = (*flags, "--quant_algo", "none")
    found[f"{output_format} fp8"] = (*flags, "--calib_cache", str(cache))
    return found


def measure_disk(model: Path, folder: Path, formats: list[str], repeats: int) -> dict[str, Any]:
    cache = folder / layout.REPORT
    assert cache.exists(), "run `memory` first: it makes the scales"
    files, output, copied = input_files(model), folder / "output", folder / "copy"
    read_bytes = sum(path.stat().st_size for path in files)
    write_bytes: dict[str, int] = {}
    peak_bytes: dict[str, int] = defaultdict(int)
    runs: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    copy_of: dict[str, str] = {}

    def add(name: str, seconds: float, cpu_seconds: float) -> None:
        runs[name].append(seconds)
        cpu[name].append(cpu_seconds)
        text = f"{seconds:.1f} s ({cpu_seconds:.1f} s of CPU), {len(runs[name])} of {repeats}"
        print(f"{name} {text}", file=sys.stderr)

    for _ in range(repeats):
        for output_format in formats:
            copy = f"{output_format} copy"
            for name, flags in conversions(output_format, cache).items():
                copy_of[name] = copy
                forget(files)
                measured = convert(model, output, *flags)
                write_bytes[name] = size_of(output)
                write_bytes[copy] = max(write_bytes.get(copy, 0), write_bytes[name])
                peak_bytes[name] = max(peak_bytes[name], measured.peak_bytes)
                shutil.rmtree(output)
                add(name, measured.seconds, measured.cpu_seconds)
            forget(files)
            cpu_start = time.process_time()
            seconds = copy_seconds(files, copied, write_bytes[copy])
            copied.unlink()
            add(copy, seconds, time.process_time() - cpu_start)
    rates = {name: read_bytes / 1e9 / statistics.median(times) for name, times in runs.items()}
    return {
        "layers": read_config(model).decoder.num_hidden_layers,
        "read_bytes": read_bytes,
        "write_bytes": write_bytes,
        "planned_bytes": planned_bytes(model, is_calibrated=False),
        "peak_bytes": peak_bytes,
        "seconds": runs,
        "cpu_seconds": cpu,
        "load_average": os.getloadavg(),
        "read_gb_per_s": rates,
        "share_of_copy": {name: rates[name] / rates[copy] for name, copy in copy_of.items()},
    }


def write_calibration(folder: Path) -> Path:
    """One long sample: SAMPLES says what it is at full width."""
    path = folder / "calibration.jsonl"
    path.write_text(json.dumps({"prompt": _LONG_QUESTION, "image": str(PHOTO)}) + "\n")
    return path


def measure_memory(models: dict[int, Path], folder: Path, formats: list[str]) -> dict[str, Any]:
    calibration = write_calibration(folder)
    few, many = min(models), max(models)
    peak_bytes: dict[str, dict[int, int]] = defaultdict(dict)
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    for output_format in formats:
        for layers, model in models.items():
            output, flags = folder / "output", ("--output_format", output_format)
            measured = convert(model, output, *flags, "--calib_data", str(calibration))
            peak_bytes[output_format][layers] = measured.peak_bytes
            seconds[output_format][layers] = measured.seconds
            if layers == many:
                shutil.copy(output / layout.REPORT, folder)
            shutil.rmtree(output)
            text = f"{measured.peak_bytes / 1e9:.2f} GB, {measured.seconds:.0f} s"
            print(f"{output_format}, {layers} layers: {text}", file=sys.stderr)
    return {
        "planned_bytes": planned_bytes(models[many], is_calibrated=True),
        "peak_bytes": peak_bytes,
        "seconds": seconds,
        "calibration_samples": SAMPLES,
        "seconds_per_decoder_layer": {
            output_format: (times[many] - times[few]) / (many - few)
            for output_format, times in seconds.items()
        },
    }


def output_formats(text: str) -> list[str]:
    """The flag `--output_format`: one or several of the converter's, with commas."""
    names = text.split(",")
    for name in names:
        if name not in OUTPUT_FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(OUTPUT_FORMATS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("disk", "memory"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output_format", type=output_formats, default=[TRTLLM])
    parser.add_argument("--depths", type=int, nargs=2, default=list(LAYERS))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="72b")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    few, many = arguments.depths
    if not 0 < few < many:
        parser.error(f"--depths is {few} {many}, expected rising numbers; give two, as in 2 6")
    folder, formats = arguments.folder.absolute(), arguments.output_format
    folder.mkdir(parents=True, exist_ok=True)
    models = make_models(folder, (few, many), arguments.preset)
    if arguments.part == "disk":
        result = measure_disk(models[max(models)], folder, formats, arguments.repeats)
    else:
        result = measure_memory(models, folder, formats)
    json.dump({"machine": describe(), **result}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
