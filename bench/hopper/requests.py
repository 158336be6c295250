"""Time to the first token of a request with seven tiles, by the executors alone."""

from __future__ import annotations

import statistics
import time

from bench.ceilings import Ceilings
from bench.hopper.decoder import PAUSE_S, prefill_flop, random_prompt
from bench.hopper.parts import Parts
from bench.hopper.vision import random_tiles, tile_flop
from bench.rows import Row
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir

_TEXT_TOKENS = 156  # with 7 tiles of 256 tokens: 1,948
_NUM_TILES = 7


def measure_first_token(
    executor: TorchDecoderExecutor,
    engine: EngineDir,
    parts: Parts,
    precision: str,
    ceilings: Ceilings,
    repeats: int = 8,
) -> Row:
    """Tiles in the host's memory to the first token on the host."""
    config, vision_config = engine.checkpoint_config, engine.vision_config
    vision = parts.vision(engine, precision)
    times = []
    for repeat in range(2 + repeats):
        tiles = random_tiles(vision_config, _NUM_TILES, seed=repeat)
        text = random_prompt(config.decoder.vocab_size, _TEXT_TOKENS, seed=repeat)
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        table = vision.encode(tiles).flatten(0, 1)
        first = config.decoder.vocab_size
        prompt = [*text[:30], *range(first, first + len(table)), *text[30:]]
        executor.submit(DecoderRequest(prompt, 1, prompt_table=table))
        assert len(executor.step()) == 1
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    tiles_flop = _NUM_TILES * tile_flop(vision_config) / parts.num_ranks
    flop = tiles_flop + prefill_flop(config, len(prompt))
    return Row(
        f"first, {precision}",
        config.decoder.num_hidden_layers,
        1,
        len(prompt),
        1e3 * seconds,
        1 / seconds,
        flop / seconds,
        flop / seconds / ceilings.fp8_flop_per_s,
    )
