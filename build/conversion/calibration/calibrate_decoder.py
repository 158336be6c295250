"""Runs the calibration samples through one decoder layer, or the last norm, and says what entered
the linears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from build.conversion.calibration.amax_observer import AmaxObserver
from build.conversion.calibration.row_file import RowFile
from nvlm.formats.tensor_names import HEAD
from nvlm.model.config import DecoderConfig
from nvlm.model.decoder import (
    DECODER_LINEARS,
    DecoderLayer,
    causal_attention,
    rms_norm,
    rope_tables,
)

_ROWS_PER_WINDOW = 2048
"""Tokens that a layer works on at a time: about 1 GB of activations at the 72B model's width."""
_SCORE_BYTES = 256 << 20
"""Attention scores at a time: for float32 with grouped heads a GPU has no kernel that keeps them to
itself, and a window of a long sample has gigabytes of them, three times over."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive tokens of one sequence."""

    sequence: int  # its place among the samples, from 0
    position: int  # of the first token
    count: int  # tokens
    is_last: bool  # whether it ends the sequence


def run_layer(
    layer: DecoderLayer,
    config: DecoderConfig,
    lengths: list[int],
    before: RowFile,
    after: RowFile,
    observer: AmaxObserver,
    device: torch.device,
) -> None:
    """Hidden states of all sequences, [sum of lengths, hidden_size], from `before` to `after`.

    In the unquantised dtype, window by window: a sequence that an edge cuts continues in the
    next one with the keys and values so far, as in chunked prefill. Memory: the layer as given,
    its widest linear in float32, one window's activations, one sequence's keys and values,
    `_SCORE_BYTES` of scores (on a GPU three times).
    """
    observer.watch_inputs({name: layer.linear(name) for name in DECODER_LINEARS})
    past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with after.writer() as writer:
        for window in before.windows(_ROWS_PER_WINDOW):
            segments = list(_segments(lengths, window))
            ranges = [torch.arange(s.position, s.position + s.count) for s in segments]
            positions = torch.cat(ranges).to(device)
            cos, sin = rope_tables(positions, config.head_dim, config.rope_theta)
            attention = WindowAttention(segments, past, observer)
            writer.append(layer(before.read(window).to(device), cos, sin, attention))


def norm_rows(
    norm: torch.Tensor, eps: float, before: RowFile, observer: AmaxObserver, device: torch.device
) -> None:
    """Shows `observer` what enters the head: the last layer's rows, normed. norm: [hidden_size]."""
    for window in before.windows(_ROWS_PER_WINDOW):
        observer.see_input(HEAD, rms_norm(before.read(window).to(device), norm, eps))


class WindowAttention:
    """`Attention` of a window's segments, each over its own sequence, in one layer.

    past: keys and values of sequences that a window before has begun; `forward` adds those that go
    on in the next one. observer: sees q, k and v.
    """

    def __init__(
        self,
        segments: list[_Segment],
        past: dict[int, tuple[torch.Tensor, torch.Tensor]],
        observer: AmaxObserver,
    ) -> None:
        self._segments, self._past, self._observer = segments, past, observer

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        for name, x in (("q", q), ("k", k), ("v", v)):
            self._observer.see_heads(name, x)
        counts = [segment.count for segment in self._segments]
        outputs: list[torch.Tensor] = []
        for segment, rows, *new in zip(
            self._segments, q.split(counts), k.split(counts), v.split(counts), strict=True
        ):
            keys, values = new
            if segment.position:
                old_keys, old_values = self._past.pop(segment.sequence)
                keys, values = torch.cat((old_keys, keys)), torch.cat((old_values, values))
            if not segment.is_last:
                self._past[segment.sequence] = keys, values
            outputs += _in_blocks(rows, keys, values, segment.position)
        return torch.cat(outputs).to(q.dtype)


def _in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int
) -> Iterator[torch.Tensor]:
    """`causal_attention` of as many rows at a time as `_SCORE_BYTES` allow."""
    most = max(1, _SCORE_BYTES // (4 * q.shape[1] * len(k)))
    for start in range(0, len(q), most):
        first, block = first_position + start, q[start : start + most]
        seen = first + len(block)
        yield causal_attention(block, k[:seen], v[:seen], first)


def _segments(lengths: list[int], window: range) -> Iterator[_Segment]:
    """The parts of sequences that lie in a window of all their tokens."""
    start = 0
    for sequence, length in enumerate(lengths):
        first, last = max(window.start, start), min(window.stop, start + length)
        if first < last:
            yield _Segment(sequence, first - start, last - first, last == start + length)
        start += length
