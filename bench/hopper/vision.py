"""Vision with its projector, through `VisionExecutor.encode`: tiles in the host's memory to image
embeddings on the device, times by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from bench.ceilings import Ceilings
from bench.hopper.decoder import PAUSE_S
from bench.hopper.parts import Parts
from bench.rows import Row
from nvlm.model.config import VisionConfig
from runtime.engine.engine_dir import EngineDir


def measure_vision(
    parts: Parts,
    engine: EngineDir,
    precision: str,
    num_tiles: int,
    ceilings: Ceilings,
    repeats: int = 10,
) -> Iterator[Row]:
    config, device = engine.vision_config, parts.device
    executor = parts.vision(engine, precision)
    tiles = random_tiles(config, num_tiles, seed=0)
    flop = num_tiles * tile_flop(config) / parts.num_ranks
    ceiling = ceilings.fp8_flop_per_s if precision == "FP8" else ceilings.bf16_flop_per_s
    num_positions = num_tiles * config.num_positions
    for is_busy in (False, True):
        times = []
        for _ in range(2 + repeats):
            if not is_busy:
                time.sleep(PAUSE_S)
            start = time.perf_counter()
            executor.encode(tiles)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[2:])
        yield Row(
            f"vision {precision}" + ", busy" * is_busy,
            config.num_hidden_layers,
            num_tiles,
            num_positions,
            1e3 * seconds,
            num_positions / seconds,
            flop / seconds,
            flop / seconds / ceiling,
        )


def random_tiles(config: VisionConfig, num_tiles: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    return torch.randint(256, (num_tiles, size, size, 3), dtype=torch.uint8, generator=generator)


def tile_flop(config: VisionConfig) -> float:
    """Linears, attention, patch embedding and projector of one tile."""
    positions, size = config.num_positions, config.hidden_size
    linears = 4 * size * config.attention_size + 2 * size * config.intermediate_size
    attention = 2 * positions * config.attention_size
    layers = config.num_hidden_layers * positions * (linears + attention)
    patches = (positions - 1) * size * 3 * config.patch_size**2
    width = config.projector_hidden_size
    projector = config.tokens_per_tile * width * (config.projector_input_size + config.output_size)
    return 2.0 * (layers + patches + projector)
