"""The plot of GPU results, from results made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.plots import draw, floor, points, read_results
from nvlm.errors import UserError

CEILINGS = {"copy_bytes_per_s": 3e12, "bf16_flop_per_s": 8e14, "fp8_flop_per_s": 1.4e15}


def results(slopes: dict[tuple[str, int, int], float]) -> dict[str, Any]:
    names = ("phase", "batch_size", "num_tokens")
    return {
        "machine": {"cpu": "a CPU", "gpu": "a GPU"},
        "ceilings": CEILINGS,
        "rows": [
            {**dict(zip(names, key, strict=True)), "num_layers": 8, "ms": 8 * ms + 1}
            for key, ms in slopes.items()
        ],
        "slopes": [
            {**dict(zip(names, key, strict=True)), "ms_per_layer": ms} for key, ms in slopes.items()
        ],
    }


OURS = results({("decode", 1, 2048): 0.33, ("decode", 64, 2048): 0.45, ("prefill", 1, 1948): 2.9})


def test_slopes_are_drawn_beside_peers_and_the_ceiling(tmp_path: Path) -> None:
    peers = results({("decode", 1, 2048): 1.2, ("prefill", 1, 1948): 6.2})
    figure = draw({"us": OURS, "transformers": peers})
    decode, prefill = figure.axes
    assert [len(axes.patches) for axes in (decode, prefill)] == [2 + 1, 1 + 1]
    assert decode.get_ylim()[1] > 1.2
    floors = [len(lines.get_paths()) for lines in decode.collections]
    assert floors == [2, 1]
    labels = [text.get_text() for text in decode.get_legend().get_texts()]
    assert labels == ["at the run's measured ceiling", "us", "transformers"]
    figure.savefig(tmp_path / "plot.svg", metadata={"Date": None})
    assert "a GPU" in (tmp_path / "plot.svg").read_text()


def test_the_floor_is_a_layers_bytes_over_the_copy_rate() -> None:
    """877.7 M FP8 weights, 20,480 bfloat16 norms and 10,240 biases; 4 MiB of keys and values."""
    least = floor(CEILINGS, "decode", (1, 2048))
    assert least == pytest.approx((877_658_112 + 4 * 2**20) / 3e9, rel=1e-3)
    assert floor(CEILINGS, "decode", (64, 2048)) > least
    assert floor(CEILINGS, "prefill", (1, 1948)) == pytest.approx(2.5, rel=0.03)


def test_one_number_of_layers_counts_the_whole_step() -> None:
    assert points(OURS | {"slopes": []}, "decode")[1, 2048] == pytest.approx(0.33 + 1 / 8)


def test_results_are_the_last_line_of_a_log_or_a_file_of_their_own(tmp_path: Path) -> None:
    log, own = tmp_path / "log", tmp_path / "own.json"
    log.write_text(f"copy 3 TB/s\n{json.dumps(OURS)}\n")
    own.write_text(json.dumps(OURS, indent=2))
    assert read_results([f"a={log}", f"b={own}"]) == {"a": OURS, "b": OURS}


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"slopes": [1]}', ""])
def test_what_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UserError, match="names no results"):
        read_results([f"us={path}"])
