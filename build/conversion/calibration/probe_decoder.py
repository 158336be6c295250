"""What each linear of a decoder layer, and its KV cache, add to the layer's output in FP8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from build.conversion.calibration.residual_error import QuantisedLinears, residual_errors
from build.conversion.calibration.row_file import RowFile
from build.conversion.report.quantization_report import AttentionReport
from nvlm.model.config import DecoderConfig
from nvlm.model.decoder import DECODER_LINEARS, DecoderLayer, causal_attention, rope_tables
from nvlm.model.number_formats import FP8, LinearScales, NumberFormat

NUM_SEQUENCES, NUM_TOKENS = 4, 32
"""The beginnings of so many samples, each of so many tokens: text, tile tags and virtual tokens."""

_ONE_SCALE, _OWN_SCALES = "one scale", "own scales"


@dataclass(frozen=True, slots=True)
class Probe:
    """The rows of hidden states that a layer is probed with: beginnings of sequences."""

    hidden: torch.Tensor  # [num_rows, hidden_size], sequence after sequence
    counts: tuple[int, ...]  # rows of each sequence

    @classmethod
    def read(cls, states: RowFile, lengths: list[int], device: torch.device) -> Probe:
        """states: [sum of lengths, hidden_size], the layer's input."""
        starts = [sum(lengths[:i]) for i in range(min(NUM_SEQUENCES, len(lengths)))]
        counts = tuple(min(NUM_TOKENS, lengths[i]) for i in range(len(starts)))
        parts = [
            states.read(range(start, start + count))
            for start, count in zip(starts, counts, strict=True)
        ]
        return cls(torch.cat(parts).to(device, torch.float32), counts)


@dataclass(frozen=True, slots=True)
class ProbeAttention:
    """`Attention` of sequences from their beginnings, with K and V stored by the scales given."""

    counts: tuple[int, ...]  # rows of each sequence
    key_scale: float | None = None  # of FP8; None: K is not quantised
    value_scale: float | None = None  # of FP8; None: V is not quantised
    values: list[torch.Tensor] = field(default_factory=list)  # V as it came, of each run

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        self.values.append(v)
        k, v = _stored(k, self.key_scale), _stored(v, self.value_scale)
        parts = zip(q.split(self.counts), k.split(self.counts), v.split(self.counts), strict=True)
        return torch.cat([causal_attention(*part, 0) for part in parts])


def probe_layer(
    layer: DecoderLayer,
    config: DecoderConfig,
    probe: Probe,
    scales: Mapping[str, LinearScales],
    number_format: NumberFormat,
    attention: AttentionReport,
) -> tuple[dict[str, float], AttentionReport]:
    """Residual errors of the linears by name, and `attention` with those of the cache."""
    positions = torch.cat([torch.arange(count) for count in probe.counts])
    cos, sin = rope_tables(positions.to(probe.hidden.device), config.head_dim, config.rope_theta)

    def run(stored: ProbeAttention) -> torch.Tensor:
        return layer(probe.hidden, cos, sin, stored)

    one = attention.kv_cache_scaling_factor
    key, value = (FP8.scale_from_amax(amax) for amax in (attention.k_amax, attention.v_amax))
    caches = {
        _ONE_SCALE: ProbeAttention(probe.counts, one, one),
        _OWN_SCALES: ProbeAttention(probe.counts, key, value),
    }
    plain = ProbeAttention(probe.counts)
    linears = {name: layer.linear(name) for name in DECODER_LINEARS}
    errors = residual_errors(
        partial(run, plain),
        QuantisedLinears(linears, scales, number_format),
        {name: partial(run, stored) for name, stored in caches.items()},
    )
    return {name: errors[name] for name in DECODER_LINEARS}, replace(
        attention,
        residual_error=errors[_ONE_SCALE],
        own_scales_residual_error=errors[_OWN_SCALES],
        v_error=_rounding_error(plain.values[0], one),
        v_own_scale_error=_rounding_error(plain.values[0], value),
    )


def _stored(x: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The values as they come out of a cache with this scale."""
    return x if scale is None else FP8.dequantize(FP8.quantize(x, scale), scale)


def _rounding_error(x: torch.Tensor, scale: float) -> float:
    """The relative 2-norm of what the cache's rounding changes."""
    whole = x.to(torch.float64).norm()
    difference = (_stored(x, scale) - x).to(torch.float64).norm()
    return float(difference / whole) if whole > 0 else 0.0
