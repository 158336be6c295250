"""Triton: every setting of every row of a batch in one pass over its logits.

A program reads a chunk of a row once and writes it once. The few tokens of the chunk that have a
bias or may be banned come after it, from the row's own logits: a bias acts before the penalties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.decoder.kernels.logit_changes import CHUNK, DRAWN, LogitChanges

_PAIRS_AT_ONCE = 32


@triton.jit
def _penalised(x, count, repetition, presence, frequency, COUNT_DRAWN: tl.constexpr):
    divided = tl.where(x < 0, x * repetition, tl.math.div_rn(x, repetition))
    x = tl.where(count > 0, divided, x)
    num_drawn = count // COUNT_DRAWN
    return x - (num_drawn * frequency + tl.where(num_drawn > 0, presence, 0.0))


@triton.jit
def _change_logits(
    logits, changed, places, row_slots, penalties, counts, starts, pair_tokens, biases, bans,
    vocab_size, num_changed, num_chunks,
    HAS_COUNTS: tl.constexpr, COUNT_DRAWN: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab_size
    x = tl.load(logits + row * vocab_size + columns, mask, other=0.0)
    place = tl.load(places + row)
    if place >= 0:
        repetition, presence, frequency = 1.0, 0.0, 0.0
        slot = tl.load(row_slots + place)
        if HAS_COUNTS:
            repetition = tl.load(penalties + place)
            presence = tl.load(penalties + num_changed + place)
            frequency = tl.load(penalties + 2 * num_changed + place)
            count = tl.load(counts + slot * vocab_size + columns, mask, other=0)
            x = _penalised(x, count, repetition, presence, frequency, COUNT_DRAWN)
        tl.store(changed + row * vocab_size + columns, x, mask)
        begin = tl.load(starts + place * (num_chunks + 1) + chunk)
        end = tl.load(starts + place * (num_chunks + 1) + chunk + 1)
        if begin < end:
            tl.debug_barrier()  # other threads wrote these tokens without their biases
        for first in range(begin, end, PAIRS):
            pair = first + tl.arange(0, PAIRS)
            is_pair = pair < end
            token = tl.load(pair_tokens + pair, is_pair, other=0)
            y = tl.load(logits + row * vocab_size + token, is_pair, other=0.0)
            y += tl.load(biases + pair, is_pair, other=0.0)
            if HAS_COUNTS:
                times = tl.load(counts + slot * vocab_size + token, is_pair, other=0)
                y = _penalised(y, times, repetition, presence, frequency, COUNT_DRAWN)
            y += tl.load(bans + pair, is_pair, other=0.0)
            tl.store(changed + row * vocab_size + token, y, is_pair)
    else:
        tl.store(changed + row * vocab_size + columns, x, mask)


def change_logits(
    logits: torch.Tensor, changes: LogitChanges, counts: torch.Tensor | None, bans: torch.Tensor
) -> torch.Tensor:
    """As `logit_changes.change_logits`, to the bit."""
    logits = logits.contiguous()
    (num_rows, vocab_size), changed = logits.shape, torch.empty_like(logits)
    num_chunks = changes.starts.shape[1] - 1
    _change_logits[(num_rows, num_chunks)](
        logits, changed, changes.places, changes.slots, changes.penalties,
        logits if counts is None else counts, changes.starts, changes.pair_tokens, changes.biases,
        bans, vocab_size, len(changes.rows), num_chunks,
        HAS_COUNTS=counts is not None, COUNT_DRAWN=DRAWN, BLOCK=CHUNK, PAIRS=_PAIRS_AT_ONCE,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return changed
