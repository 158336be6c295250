"""The plots of GPU results, from results made up and from those in the repository."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.ceilings import Ceilings
from bench.hopper.decoder import decode_row, prefill_row
from bench.plots import draw
from bench.plots.draw import plotted
from bench.plots.layers import points
from bench.plots.panels import Bar
from bench.rows import Row
from bench.synthetic_engine import DECODERS
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.program.errors import UserError
from tests.support.command import ROOT

CEILINGS = {"copy_bytes_per_s": 3e12, "bf16_flop_per_s": 8e14, "fp8_flop_per_s": 1.4e15}

Written = Callable[[dict[str, Any]], Path]
Depths = tuple[int, ...]


def whole(*rows: Row) -> dict[str, Any]:
    return {
        "machine": {"cpu": "a CPU", "gpu": "a GPU"},
        "ceilings": CEILINGS,
        "rows": [row.to_json() for row in rows],
    }


def results(slopes: dict[tuple[str, int, int], float], depths: Depths = (8, 16)) -> dict[str, Any]:
    """Milliseconds per layer, and one for the rest."""
    return whole(
        *(
            Row(phase, depth, batch_size, num_tokens, depth * ms + 1, 1.0, 1.0, 0.9)
            for (phase, batch_size, num_tokens), ms in slopes.items()
            for depth in depths
        )
    )


OURS = results({("decode", 1, 2048): 0.33, ("decode", 64, 2048): 0.45, ("prefill", 1, 1948): 2.9})
MODEL = whole(
    Row("decode", 80, 1, 2048, 20.0, 50.0, 3.6e12, 0.9),
    Row("decode", 80, 64, 2048, 30.0, 2133.0, 3.0e12, 0.8),
    Row("prefill", 80, 1, 1948, 220.0, 8854.0, 1e15, 0.9),
    Row("prefill, busy", 80, 1, 1948, 232.0, 8396.0, 1e15, 0.85),
    Row("first, bfloat16", 80, 1, 1948, 350.0, 2.9, 1e15, 0.7),
    Row("first, FP8", 80, 1, 1948, 300.0, 3.3, 1e15, 0.8),
    Row("serving", 80, 64, 2048, 38000.0, 420.0, 1e15, 0.75),
)
VISION = whole(
    Row("vision bfloat16", 45, 7, 7175, 140.0, 5e4, 6e14, 0.8),
    Row("vision bfloat16, busy", 45, 7, 7175, 150.0, 5e4, 6e14, 0.75),
    Row("vision FP8", 45, 7, 7175, 90.0, 8e4, 1e15, 0.7),
    Row("vision FP8, busy", 45, 7, 7175, 95.0, 8e4, 1e15, 0.65),
)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(values))
        return path

    return write


def heights(axes: Any) -> list[float]:
    """From left to right."""
    return [bar.get_height() for bar in sorted(axes.patches, key=lambda bar: bar.get_x())]


def dashes(axes: Any) -> list[float]:
    return [float(path.vertices[0][1]) for lines in axes.collections for path in lines.get_paths()]


def ticks(axes: Any) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in axes.get_xticklabels()]


def test_slopes_are_drawn_beside_peers_and_the_ceiling(written: Written, tmp_path: Path) -> None:
    peers = results({("decode", 1, 2048): 1.2, ("prefill", 1, 1948): 6.2})
    named = [f"us={written(OURS)}", f"transformers={written(peers)}"]
    figure = plotted("layers", named)
    decode, prefill = figure.axes
    assert [len(axes.patches) for axes in (decode, prefill)] == [2 + 1, 1 + 1]
    assert decode.get_ylim()[1] > 1.2
    floors = [len(lines.get_paths()) for lines in decode.collections]
    assert floors == [2, 1]
    labels = [text.get_text() for text in decode.get_legend().get_texts()]
    assert labels == ["at the run's measured ceiling", "us", "transformers"]
    figure.savefig(tmp_path / "plot.svg", metadata={"Date": None})
    assert "a GPU" in (tmp_path / "plot.svg").read_text()


def test_a_layer_is_what_the_deeper_model_takes_more() -> None:
    (point,) = points(results({("decode", 1, 2048): 0.33}), "decode").items()
    assert point == ((1, 2048), Bar(pytest.approx(0.33), pytest.approx(0.9 * 0.33)))  # type: ignore[arg-type]


def test_the_ceiling_is_a_layers_bytes_over_the_copy_rate() -> None:
    """877.7 M FP8 weights, 20,480 bfloat16 norms and 10,240 biases; 4 MiB of keys and values, or
    8 in bfloat16."""
    for kv_cache, kv_bytes in (("FP8", 4 * 2**20), (None, 8 * 2**20)):
        rows = []
        for num_layers in (8, 16):
            decoder = replace(DECODERS["72b"], num_hidden_layers=num_layers)
            config = CheckpointConfig(decoder, "bfloat16", "FP8", kv_cache)
            rows.append(decode_row(config, 1, 2048, 0.01 * num_layers, Ceilings(**CEILINGS)))
            rows.append(prefill_row(config, 1948, 0.05 * num_layers, CEILINGS["fp8_flop_per_s"]))
        (decode,) = points(whole(*rows), "decode").values()
        (prefill,) = points(whole(*rows), "prefill").values()
        assert decode.ceiling == pytest.approx((877_658_112 + kv_bytes) / 3e9, rel=1e-3)
        assert prefill.ceiling == pytest.approx(2.5, rel=0.03)
        assert (decode.height, prefill.height) == (pytest.approx(10), pytest.approx(50))


def test_one_number_of_layers_counts_the_whole_step() -> None:
    found = points(results({("decode", 1, 2048): 0.33}, (8,)), "decode")[1, 2048]
    assert found.height == pytest.approx(0.33 + 1 / 8)
    assert found.ceiling == pytest.approx(0.9 * found.height)


def test_vision_is_drawn_by_precision_after_a_pause_and_busy(written: Written) -> None:
    (axes,) = plotted("vision", [f"us={written(VISION)}"]).axes
    assert axes.get_title() == "vision and projector, tiles: 7"
    assert axes.get_ylabel() == "ms"
    assert dict(zip(ticks(axes), heights(axes), strict=True)) == {
        "FP8, after a pause": 90.0,
        "FP8, busy": 95.0,
        "bfloat16, after a pause": 140.0,
        "bfloat16, busy": 150.0,
    }


def test_the_whole_model_is_drawn_phase_by_phase(written: Written) -> None:
    figure = plotted("model", [f"us={written(MODEL)}"])
    found = {
        axes.get_title(): dict(zip(ticks(axes), heights(axes), strict=True)) for axes in figure.axes
    }
    assert found == {
        "decode": {"1": 20.0, "64": 30.0},
        "prefill": {"1,948, after a pause": 220.0, "1,948, busy": 232.0},
        "first token, seven tiles": {"FP8": 300.0, "bfloat16": 350.0},
        "serving": {"64": 420.0},
    }
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["ms a token", "ms", "ms", "tokens/s out"]


def test_the_ceilings_are_the_least_times_and_the_most_tokens(written: Written) -> None:
    decode, _, first, serving = plotted("model", [f"us={written(MODEL)}"]).axes
    assert dashes(decode) == pytest.approx([0.9 * 20, 0.8 * 30])
    assert sorted(dashes(first)) == pytest.approx([240, 245])
    assert dashes(serving) == pytest.approx([560])


def test_ranks_that_measured_less_stand_beside_one(written: Written) -> None:
    """As `bench.ranks decode prefill` writes it: a batch size more, no serving."""
    ranks = whole(
        Row("decode", 80, 1, 2048, 12.0, 83.0, 3.2e12, 0.8),
        Row("decode", 80, 8, 2048, 13.0, 615.0, 3.2e12, 0.8),
        Row("prefill", 80, 1, 1948, 130.0, 14984.0, 9e14, 0.6),
    )
    figure = plotted("model", [f"one={written(MODEL)}", f"two={written(ranks)}"])
    decode, prefill, first, _ = figure.axes
    assert ticks(decode) == ["1", "8", "64"]
    assert heights(decode) == [20.0, 12.0, 13.0, 30.0]
    assert heights(prefill) == [220.0, 130.0, 232.0]
    assert [text.get_text() for text in first.get_legend().get_texts()][1:] == ["one"]


def test_an_odd_number_of_panels_leaves_no_empty_axes(written: Written) -> None:
    values = MODEL | {"rows": [row for row in MODEL["rows"] if row["phase"] != "serving"]}
    assert len(plotted("model", [f"us={written(values)}"]).axes) == 3


def test_the_same_results_give_the_same_bytes(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.svg" for name in ("a", "b")]
    path = written(MODEL)
    for file in files:
        arguments = ["plots", "model", "--results", f"us={path}", "--output", str(file)]
        monkeypatch.setattr(sys, "argv", arguments)
        draw.main()
    assert files[0].read_bytes() == files[1].read_bytes()


def test_results_are_the_last_line_of_a_log_or_a_file_of_their_own(tmp_path: Path) -> None:
    log, own = tmp_path / "log", tmp_path / "own.json"
    log.write_text(f"copy 3 TB/s\n{json.dumps(OURS)}\n")
    own.write_text(json.dumps(OURS, indent=2))
    decode, _ = plotted("layers", [f"a={log}", f"b={own}"]).axes
    assert heights(decode) == pytest.approx([0.33, 0.33, 0.45, 0.45])


@pytest.mark.parametrize("plot", draw.PLOTS)
@pytest.mark.parametrize("text", ["{}", "no JSON", '{"slopes": [1]}', "", json.dumps(results({}))])
def test_what_holds_no_results_is_refused(tmp_path: Path, plot: str, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UserError, match=f"names no results for '{plot}'"):
        plotted(plot, [f"us={path}"])


@pytest.mark.parametrize("output", ["missing/plot.svg", "plot.nope"])
def test_an_output_that_cannot_be_written_is_refused(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    arguments = ["layers", "--results", f"us={written(OURS)}", "--output", str(tmp_path / output)]
    monkeypatch.setattr("sys.argv", ["plots", *arguments])
    with pytest.raises(UserError, match="cannot be written"):
        draw.main()
    assert not (tmp_path / output).exists()


def test_the_documents_plots_are_those_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command in docs/hopper.md, by the texts that it draws: all numbers are among them."""
    page = (ROOT / "docs" / "hopper.md").read_text().replace("\\\n", " ")
    commands = [
        shlex.split(line)
        for line in re.findall(r"^    python -m bench\.plots\.draw (.*)", page, re.M)
    ]
    assert {command[-1] for command in commands} == {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("hopper_*.svg")
    }
    monkeypatch.chdir(ROOT)
    for *arguments, committed in commands:
        monkeypatch.setattr(sys, "argv", ["plots", *arguments, str(tmp_path / "plot.svg")])
        draw.main()
        drawn, kept = (path.read_text() for path in (tmp_path / "plot.svg", ROOT / committed))
        assert _texts(drawn) == _texts(kept), f"{committed} is not of these results: draw it again"


def _texts(svg: str) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", svg, re.S)
