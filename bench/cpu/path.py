"""The main path on a CPU: tiling, vision, prefill, decode and memory.

    python -m bench.cpu.path [--engine_dir D] [--repeats N]

Without an engine it makes one of random weights (tools.make_random_checkpoint, preset "small":
448 px tiles of 256 tokens, 8 decoder layers of width 512, FP8), so that only speed means
something. Every number is a median over the repeats after one warm-up run. Tiling stands beside
the README of nvidia/NVLM-D-72B written with Pillow and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.machine import describe, peak_memory_bytes
from build.conversion.convert import ConvertOptions, convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.inputs.images import load_image
from nvlm.inputs.tiling import choose_grid, normalize, tile_image
from nvlm.planning.device_memory import total_memory_bytes
from runtime.decoder.executor import DecoderRequest
from runtime.serving.runner import Runner
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint

CPU = torch.device("cpu")
PHOTO = Path(__file__).parents[2] / "examples" / "coffee.jpg"
PROMPT_TOKENS, NEW_TOKENS, BATCH_SIZES = 512, 32, (1, 8)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_engine(folder: Path) -> Path:
    write_random_checkpoint(folder / "model", PRESETS["small"])
    options = ConvertOptions(calib_size=2)
    convert(HuggingFaceSource(folder / "model"), folder / "checkpoint", options, CPU)
    build_options = BuildOptions()
    spec = specify(folder / "checkpoint", build_options, CPU, total_memory_bytes(CPU))
    build_engine(spec, folder / "engine", build_options)
    return folder / "engine"


def plain_pillow(image: Image.Image, image_size: int, max_num_tiles: int) -> np.ndarray[Any, Any]:
    """`load_image` of the model's README: crop by crop, each converted and normalised alone."""
    columns, rows = choose_grid(*image.size, image_size, max_num_tiles)
    resized = image.resize((columns * image_size, rows * image_size))
    crops = [
        resized.crop((x, y, x + image_size, y + image_size))
        for y in range(0, rows * image_size, image_size)
        for x in range(0, columns * image_size, image_size)
    ]
    if len(crops) > 1:
        crops.append(image.resize((image_size, image_size)))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    tiles = [((np.asarray(c, np.float32) / 255 - mean) / std).transpose(2, 0, 1) for c in crops]
    return np.stack(tiles).astype(np.float32)


def measure_tiling(image_size: int, max_num_tiles: int, repeats: int) -> dict[str, float]:
    image = load_image(PHOTO)
    ours = median_seconds(
        lambda: normalize(tile_image(image, image_size, max_num_tiles).tiles), repeats
    )
    plain = median_seconds(lambda: plain_pillow(image, image_size, max_num_tiles), repeats)
    return {"images_per_s": 1 / ours, "plain_pillow_images_per_s": 1 / plain}


def measure_vision(runner: Runner, repeats: int) -> dict[str, float]:
    tiling = runner.engine.tiling
    shape = tiling.max_tiles_per_image, tiling.image_size, tiling.image_size, 3
    tiles = torch.randint(256, shape, dtype=torch.uint8)
    seconds = median_seconds(lambda: runner.vision.encode(tiles), repeats)
    return {"ms_per_tile": 1e3 * seconds / len(tiles), "tiles_per_s": len(tiles) / seconds}


def measure_decoder(runner: Runner, batch_size: int, repeats: int) -> dict[str, float]:
    """Prefill of `PROMPT_TOKENS` and then decode, all requests of the batch together."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = runner.engine.checkpoint_config.decoder.vocab_size
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        for _ in range(batch_size):
            ids = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
            runner.decoder.submit(DecoderRequest(ids, NEW_TOKENS))
        start = time.perf_counter()
        runner.decoder.step()
        prefilled = time.perf_counter()
        while runner.decoder.step():
            pass
        if repeat:  # the first is the warm-up
            prefill.append(prefilled - start)
            decode.append(time.perf_counter() - prefilled)
    steps = NEW_TOKENS - 1
    return {
        "batch_size": batch_size,
        "prefill_tokens_per_s": batch_size * PROMPT_TOKENS / statistics.median(prefill),
        "decode_tokens_per_s": batch_size * steps / statistics.median(decode),
        "decode_ms_per_step": 1e3 * statistics.median(decode) / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine_dir", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine_dir = arguments.engine_dir or make_engine(Path(folder))
        runner = Runner.open(engine_dir, CPU)
        tiling = runner.engine.tiling
        size, max_num_tiles = tiling.image_size, tiling.max_num_tiles
        result: dict[str, Any] = {
            "machine": describe(),
            "threads": torch.get_num_threads(),
            "vision_executor": runner.engine.vision_executor,
            "vision_precision": runner.engine.vision_precision,
            "tiling": measure_tiling(size, max_num_tiles, arguments.repeats),
            "vision": measure_vision(runner, arguments.repeats),
            "decoder": [measure_decoder(runner, b, arguments.repeats) for b in BATCH_SIZES],
        }
    result["peak_memory_bytes"] = peak_memory_bytes()
    tiling = result["tiling"]
    print(f"machine    {result['machine']['cpu']}, {result['threads']} threads")
    print(
        f"tiling     {tiling['images_per_s']:9.1f} images/s (plain Pillow "
        f"{tiling['plain_pillow_images_per_s']:.1f})"
    )
    print(f"vision     {result['vision']['tiles_per_s']:9.2f} tiles/s")
    for row in result["decoder"]:
        print(
            f"batch {row['batch_size']:<4} {row['decode_tokens_per_s']:9.1f} tokens/s decode, "
            f"{row['prefill_tokens_per_s']:.0f} tokens/s prefill"
        )
    print(f"memory     {result['peak_memory_bytes'] / 1e9:9.2f} GB at its peak, making included")
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
