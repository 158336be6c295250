"""Measures how long the steps of a loaded model take: rows that decode, and prompt tokens beside.

Runs once, before the first request, while nothing in the KV cache is anybody's. Each kind of step
runs once before it is timed, so that no request is the first to meet it.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice

import torch

from nvlm.planning.hopper import CHUNK_SIZES
from nvlm.planning.limits import EngineLimits
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.models.step import DecoderModel, SequenceStep
from runtime.decoder.step_bound import StepBound, limit_ms

log = logging.getLogger(__name__)

CONTEXT = 2048
"""Tokens before those that a measured step computes, at most. Longer ones take longer."""

_ROWS = (1, 8, 64, 256)
_REPEATS = 3
_DIFFERENT_TOKENS = 128
"""Equal rows take less power: a GPU at its limit computes them faster than those of requests
(docs/log.md). Any vocabulary with a token for each byte has so many."""

TimeMs = Callable[[Callable[[], object]], float]


@torch.inference_mode()
def measure_step_bound(
    model: DecoderModel,
    limits: EngineLimits,
    num_blocks: int,
    max_ms: float,
    device: torch.device,
    time_ms: TimeMs | None = None,
) -> StepBound | None:
    """The bound that keeps steps within `max_ms`. None where no prompt ever shares a step: a batch
    has one place. time_ms: the milliseconds of some work, by default the device's own clock.

    Measures every other size that has a graph, the first that has none, then twice as many prompt
    tokens each time, until a step takes too long."""
    begun = time.perf_counter()
    timed = time_ms or (_time_on_gpu if device.type == "cuda" else _time_on_cpu)
    most_rows = limits.max_batch_size - 1
    curves = {}
    for num_rows in sorted({*(each for each in _ROWS if each < most_rows), most_rows} - {0}):
        curve = list[tuple[int, float]]()
        for num_tokens in _sizes():
            steps = steps_of(num_rows, num_tokens, limits, num_blocks)
            if not steps:
                break
            ms = _median_ms(timed, partial(model.forward, steps))
            curve.append((num_tokens, ms))
            if ms > limit_ms(max_ms, curve[0][1]):
                break
        if curve:
            curves[num_rows] = curve
    if not curves:
        return None
    bound = StepBound.of(max_ms, curves)
    bounds = ", ".join(f"{bound.most_prompt_tokens(rows)} beside {rows}" for rows in curves)
    log.info(
        "prompt tokens of a step within %g ms: %s that decode (measured in %.1f s)",
        *(max_ms, bounds, time.perf_counter() - begun),
    )
    return bound


def _sizes() -> Iterator[int]:
    yield from CHUNK_SIZES[::2]
    num_tokens = CHUNK_SIZES[-1]
    yield num_tokens + TOKENS_PER_BLOCK  # launched: where times leap
    while True:
        num_tokens *= 2
        yield num_tokens


def steps_of(
    num_rows: int, num_tokens: int, limits: EngineLimits, num_blocks: int
) -> list[SequenceStep]:
    """`num_rows` sequences that decode after `CONTEXT` tokens, and prompts of `num_tokens` in all,
    the last chunks of as many. Empty where a step cannot hold them."""
    longest = limits.max_seq_len
    pieces = [longest] * (num_tokens // longest)
    pieces += [num_tokens % longest] * (num_tokens % longest > 0)
    has_places = num_rows + len(pieces) <= limits.max_batch_size
    if not has_places or num_rows + num_tokens > limits.max_num_tokens:
        return []
    context = min(CONTEXT, longest - 1)
    steps = [(1, context)] * num_rows
    steps += [(count, max(0, min(context, longest) - count)) for count in pieces]
    # Blocks of their own as far as there are enough: those of others would be in the L2 cache.
    numbers, tokens = cycle(range(num_blocks)), cycle(range(_DIFFERENT_TOKENS))
    return [
        SequenceStep(
            list(islice(tokens, count)),
            first,
            list(islice(numbers, num_blocks_for(first + count))),
            None,
            1,
        )
        for count, first in steps
    ]


def _median_ms(timed: TimeMs, work: Callable[[], object]) -> float:
    work()
    return statistics.median(timed(work) for _ in range(_REPEATS))


def _time_on_cpu(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def _time_on_gpu(work: Callable[[], object]) -> float:
    """Times the second of two, which is launched while the first is computed, as steps are."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    work()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
