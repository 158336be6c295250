"""Calibrated conversion at the 72B model's width on a GPU: its memory, the host's, time by layer.

    python -m bench.conversion.gpu --folder D [--output_folder D] [--depths 2 6] [--results FILE]

`folder` keeps the random model (19 GB at 6 layers) and must be a disk: the mapped files of a tmpfs
count as the converter's own memory. `output_folder` (default: the same) takes the checkpoint for as
long as it is looked at. Each depth is converted with calibration, then with its scales at hand
(--calib_cache): what a layer takes less is the cost of calibrating it. A layer's time and its parts
are means of the deepest model's layers, timed in the converter: a program's start varies by more
than a layer takes. A linear of its last layer is compared with float64. FILE is written anew after
every step; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.conversion.disk import LAYERS, ROOT, SAMPLES, make_models, write_calibration
from bench.conversion.resident_memory import Measured, run_measured
from bench.machine import describe, describe_gpu
from build.conversion.quantization.quantization_error import quantization_error
from build.conversion.report.quantization_report import QuantizationReport
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_names import DECODER_LAYER, ENGINE_LAYER
from nvlm.model.number_formats import FP8
from nvlm.program.command_line import resolve_device
from tools.make_random_checkpoint import PRESETS

_INTERVAL_S = 0.1
_ROWS = 64  # of the inputs that the sampled linear is compared with
_BLOCK_ROWS = 512
_DIVISION_ERROR = 1e-6  # weights are divided by their scale in float32
# The command, and what its device saw of it.
_CONVERT = """
import json, torch, convert_checkpoint
from bench.conversion.layer_times import LayerTimes
times = LayerTimes()
convert_checkpoint.main()
seen = {"seconds_of": times.per_layer()}
if torch.cuda.is_available():
    seen["allocated"] = torch.cuda.max_memory_allocated()
    seen["reserved"] = torch.cuda.max_memory_reserved()
print("\\n" + json.dumps(seen))
"""


@dataclass(frozen=True, slots=True)
class Converted:
    measured: Measured
    device_bytes: dict[str, int]  # peaks by who counted them; nothing on a CPU
    seconds_of: dict[str, float]  # parts of a decoder layer, in the mean


def convert(model: Path, output: Path, device: torch.device, *flags: str) -> Converted:
    command = [sys.executable, "-c", _CONVERT, "--model_dir", str(model)]
    command += ["--output_dir", str(output), "--overwrite", "--device", device.type, *flags]
    with _watched(device) as watched:
        measured = run_measured(command, cwd=ROOT)
    device_bytes = json.loads(measured.log.rstrip().rpartition("\n")[2])
    seconds_of = device_bytes.pop("seconds_of")
    return Converted(measured, {**device_bytes, **watched}, seconds_of)


def _in_words(seconds_of: dict[str, float]) -> str:
    return ", ".join(f"{part} {seconds:.3f} s" for part, seconds in seconds_of.items())


@contextmanager
def _watched(device: torch.device) -> Iterator[dict[str, int]]:
    """Fills in the most that nvidia-smi saw in use, less what was before: CUDA's context counts."""
    seen: dict[str, int] = {}
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield seen
        return
    before, done = _used_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            seen["nvidia_smi"] = max(seen.get("nvidia_smi", 0), _used_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _used_bytes() -> int:
    """What all processes use of the first GPU's memory."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return int(printed) << 20


def file_system_of(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    over = [(place, kind) for place, kind in mounts if path.is_relative_to(place)]
    return max(over, key=lambda mount: len(mount[0]))[1]


def compare_linear(model: Path, output: Path, layer: int, device: torch.device) -> dict[str, Any]:
    """A layer's down projection as it was stored, against float64: no rounding here is ours.

    `output_error` is that of random inputs, the report's that of the calibration data: they are
    two samples of one quantity, some 0.5 % apart. What the report's own function says of the same
    random inputs is `output_error_in_float32`.
    """
    name = ENGINE_LAYER.format(i=layer) + "mlp.proj"
    report = QuantizationReport.read(output / layout.REPORT)
    (row,) = (row for row in report.linears if row.linear == name)
    source = HuggingFaceSource(model)
    published = source.read(DECODER_LAYER.format(i=layer) + "mlp.down_proj.weight")
    file = SafetensorsReader(output / layout.rank_file(0))
    stored = file.read(f"{name}.weight")
    scales = FP8.read_scales(file.read, name)
    assert scales is not None
    scale, input_scale = scales.weight, scales.activation
    generator = torch.Generator(device).manual_seed(0)
    # As large as the calibration data: the largest of so many normal values is at 5 deviations.
    x = torch.randn(_ROWS, published.shape[1], generator=generator, device=device).double()
    x *= row.input_amax / 5
    x_fp8 = nearest_e4m3(x / input_scale) * input_scale
    in_float32 = quantization_error(x.float(), published.to(device), FP8, scales)
    amax, num_other = 0.0, 0
    squares = torch.zeros(4, dtype=torch.float64, device=device)
    for start in range(0, len(published), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        rows, found = (tensor[block].to(device).double() for tensor in (published, stored))
        amax = max(amax, float(rows.abs().max()))
        exact = rows / scale
        further = (found - exact).abs() - (nearest_e4m3(exact) - exact).abs()
        num_other += int((further > _DIVISION_ERROR * exact.abs()).sum())
        y = x @ rows.T
        parts = (found * scale - rows, rows, x_fp8 @ (found * scale).T - y, y)
        squares += torch.stack([part.square().sum() for part in parts])
    return {
        "linear": name,
        "shape": list(published.shape),
        "weights_scaling_factor": scale,
        "amax_over_448": amax / 448.0,
        "values_not_the_nearest": num_other,
        "weight_error": float((squares[0] / squares[1]).sqrt()),
        "weight_error_in_report": row.weight_error,
        "output_error": float((squares[2] / squares[3]).sqrt()),
        "output_error_in_float32": in_float32.output_error,
        "output_error_in_report": row.output_error,
    }


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The e4m3 number closest to each float64, by looking it up; beyond the last, the last."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    numbers = every[every.isfinite()].unique().to(x.device)
    return numbers[torch.bucketize(x, (numbers[1:] + numbers[:-1]) / 2)]


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """What is known after each step."""
    folder = arguments.folder.absolute()
    output = (arguments.output_folder or folder).absolute() / "output"
    for path in (folder, output.parent):
        path.mkdir(parents=True, exist_ok=True)
    systems = {"model": file_system_of(folder), "output": file_system_of(output.parent)}
    if systems["model"] in ("tmpfs", "ramfs"):
        sys.exit(f"--folder {folder} is a {systems['model']}, whose mapped files count as memory")
    many = max(arguments.depths)
    start = time.perf_counter()
    models = make_models(folder, tuple(arguments.depths), arguments.preset, device.type)
    result: dict[str, Any] = {
        "machine": {**describe(), **describe_gpu(device)},
        "file_systems": systems,
        "seconds_to_make_the_model": time.perf_counter() - start,
        "calibration_samples": SAMPLES,
        "peak_bytes": {},
        "peak_device_bytes": {},
        "seconds": {},
        "seconds_with_scales_at_hand": {},
        "seconds_of_a_decoder_layer": {},
    }
    yield result
    shutil.rmtree(output, ignore_errors=True)
    cache = folder / layout.REPORT
    calibrate = ("--calib_data", str(write_calibration(folder)))
    for flags, seconds in (
        (calibrate, result["seconds"]),
        (("--calib_cache", str(cache)), result["seconds_with_scales_at_hand"]),
    ):
        for depth, model in models.items():
            converted = convert(model, output, device, *flags)
            seconds[str(depth)] = converted.measured.seconds
            on_device = {
                who: f"{size / 1e9:.2f} GB" for who, size in converted.device_bytes.items()
            }
            own = f"{converted.measured.peak_bytes / 1e9:.2f} GB"
            own += f", on the device {on_device or 'nothing'}"
            print(
                f"{flags[0]}, {depth} layers: {seconds[str(depth)]:.1f} s, {own}", file=sys.stderr
            )
            if depth == many:
                result["seconds_of_a_decoder_layer"][flags[0]] = converted.seconds_of
                print(f"  a layer: {_in_words(converted.seconds_of)}", file=sys.stderr)
            if flags is calibrate:
                result["peak_bytes"][str(depth)] = converted.measured.peak_bytes
                result["peak_device_bytes"][str(depth)] = converted.device_bytes
                if depth == many:
                    shutil.copy(output / layout.REPORT, cache)
                    result["against_float64"] = compare_linear(model, output, many - 1, device)
            shutil.rmtree(output)
            yield result
    whole, streaming = (
        sum(parts.values()) for parts in result["seconds_of_a_decoder_layer"].values()
    )
    result["seconds_per_decoder_layer"] = whole
    result["calibration_seconds_per_decoder_layer"] = whole - streaming
    yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output_folder", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="72b")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for result in measure(arguments, resolve_device(arguments.device)):
        if arguments.results:
            arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
