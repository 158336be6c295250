"""What calibration saw, for people: quantization_report.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm import fp8
from nvlm.json_files import write_json_atomically


@dataclass(frozen=True, slots=True)
class LinearReport:
    """Largest magnitudes of a linear's weight and of what entered it."""

    linear: str
    weight_amax: float
    input_amax: float


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Largest magnitudes of Q and K after bias and RoPE, and of V after bias."""

    layer: str
    q_amax: float
    k_amax: float
    v_amax: float

    @property
    def amax(self) -> float:
        """What the KV cache's one scale must cover: the FP8 context kernel quantises Q with it."""
        return max(self.q_amax, self.k_amax, self.v_amax)


def write_report(
    path: Path, num_samples: int, linears: list[LinearReport], attentions: list[AttentionReport]
) -> None:
    write_json_atomically(
        path,
        {
            "num_calibration_samples": num_samples,
            "scale": f"amax / {fp8.E4M3_MAX:.0f}",
            "linears": [asdict(row) for row in linears],
            "attention": [
                {**asdict(row), "kv_cache_scaling_factor": fp8.scale_from_amax(row.amax)}
                for row in attentions
            ],
        },
    )
