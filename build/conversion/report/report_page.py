"""quantization_report.html: the report for people, one file that opens anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from build.conversion.report.line_plot import Points, line_plot
from build.conversion.report.quantization_report import LinearReport, QuantizationReport
from nvlm.formats import layout
from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.number_formats import ACTIVATION_SCALE, WEIGHT_SCALE
from nvlm.model.vision import VISION_LINEARS
from nvlm.program.html_policy import policy_tag

_STYLE = """
:root { color-scheme: light dark;
  --fg: #1a1a1a; --bg: #fff; --soft: #666; --rule: #ddd; --bar: #c8dcf0 }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e8e8e8; --bg: #161616; --soft: #9a9a9a; --rule: #3a3a3a; --bar: #26415c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 960px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-top: 2.5rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
p, .legend, .tiles { color: var(--soft); margin: .2rem 0 .6rem }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.tiles div { border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .9rem }
.tiles b { display: block; font-size: 1.25rem; color: var(--fg) }
svg { width: 100%; height: auto; color: var(--soft) }
.legend span { margin-right: 1.2rem; white-space: nowrap }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .35rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); position: sticky; top: 0; background: var(--bg) }
td { font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
td.bar { background: linear-gradient(to right, var(--bar) var(--w), transparent var(--w)) }
"""

_COLUMNS = (
    ("linear", "linear", ""),
    ("output error", "output_error", ".2%"),
    ("residual error", "residual_error", ".3%"),
    ("weight error", "weight_error", ".2%"),
    ("clipped", "clipped_share", ".3%"),
    ("to zero", "underflow_share", ".2%"),
    ("weight amax", "weight_amax", ".4g"),
    ("input amax", "input_amax", ".4g"),
    ("weight scale", WEIGHT_SCALE, ".3e"),
    ("input scale", ACTIVATION_SCALE, ".3e"),
)

_ERROR = "relative error (share)"

_PLOTS = (
    ("Relative error of the output", "output_error", _ERROR, False,
     "of the FP8 linear against the unquantised one, on rows of the calibration data (2-norm)"),
    ("Relative error of the layer's output", "residual_error", _ERROR, False,
     "of the residual stream after the layer, with this linear alone in FP8, on a few rows"),
    ("Largest input", "input_amax", "amax of the input", True,
     "amax of what enters the linear; a lone peak costs everything else precision"),
    ("Largest weight", "weight_amax", "amax of the weight", True,
     "amax of the weight in the checkpoint's dtype"),
    ("Inputs quantised to zero", "underflow_share", "share of the values", False,
     "share of the values that are not zero but become zero: below 2<sup>-10</sup> scales"),
)  # fmt: skip

_CACHE_ERRORS = (
    ("K and V, one scale", "residual_error"),
    ("K and V, scales of their own", "own_scales_residual_error"),
)

_GROUPS = (
    ("Decoder", r"transformer\.layers\.(\d+)\.", DECODER_LINEARS),
    ("Vision", r"vision_model\.encoder\.layers\.(\d+)\.", VISION_LINEARS),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the report is of."""

    model: str  # name of its folder, and its shape
    date: str  # as 2026-11-30
    samples: str  # where the samples of the calibration came from


def write_page(directory: Path, report: QuantizationReport, origin: Origin) -> None:
    (directory / layout.REPORT_PAGE).write_text(page(report, origin), encoding="utf-8")


def page(report: QuantizationReport, origin: Origin) -> str:
    parts = [_summary(report, origin)]
    for title, pattern, kinds in _GROUPS:
        series = {kind: _by_layer(report.linears, pattern, kind) for kind in kinds}
        if not any(series.values()):
            continue
        parts.append(f"<h1>{title}</h1>")
        for heading, column, axis, is_log, what in _PLOTS:
            points: dict[str, Points] = {
                kind: [
                    (layer, value)
                    for layer, row in rows
                    if (value := getattr(row, column)) is not None
                ]
                for kind, rows in series.items()
            }
            if not any(points.values()):
                continue  # an older version did not measure it
            parts.append(f"<h2>{heading}</h2><p>{what}</p>")
            parts.append(line_plot(points, heading, axis, is_log=is_log))
        if title == "Decoder":
            parts.append(_attention(report))
    parts.append(_table(report))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{policy_tag()}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quantization report: {escape(origin.model)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _by_layer(
    rows: tuple[LinearReport, ...], pattern: str, kind: str
) -> list[tuple[int, LinearReport]]:
    found = ((re.fullmatch(pattern + re.escape(kind), row.linear), row) for row in rows)
    return sorted(((int(match[1]), row) for match, row in found if match), key=lambda pair: pair[0])


def _summary(report: QuantizationReport, origin: Origin) -> str:
    errors = sorted(row.output_error for row in report.linears)
    tiles = [("samples", str(report.num_samples)), ("skipped samples", str(report.num_skipped))]
    if errors:
        tiles += [
            ("linears", str(len(errors))),
            ("median output error", f"{errors[len(errors) // 2]:.2%}"),
            ("largest output error", f"{errors[-1]:.2%}"),
            ("most clipped", f"{max(row.clipped_share for row in report.linears):.3%}"),
        ]
    boxes = "".join(f"<div>{name}<b>{value}</b></div>" for name, value in tiles)
    return (
        f"<h1>Quantization report: {escape(origin.model)}</h1>"
        f"<p>{escape(origin.date)}, calibrated on {escape(origin.samples)}</p>"
        "<p>FP8 E4M3, one static scale per tensor: amax / 448, of linears rounded up to "
        f"{report.scale_dtype}. With its three bits of mantissa, 2.6 % of error on a weight and "
        "3.7 % on an output are what the format costs; what stands out from its neighbours "
        "deserves a look.</p>"
        f'<div class="tiles">{boxes}</div>'
    )


def _attention(report: QuantizationReport) -> str:
    series: dict[str, Points] = {
        name: [(i, getattr(row, f"{name}_amax")) for i, row in enumerate(report.attentions)]
        for name in "qkv"
    }
    plot = line_plot(series, "q, k, v amax", "amax", is_log=True)
    warning = report.warning()
    note = f"<p><b>{escape(warning)}</b></p>" if warning else ""
    return (
        "<h2>Queries, keys and values</h2><p>amax after bias and RoPE; the KV cache's scale "
        f"covers the largest of the three</p>{note}{plot}{_cache(report)}"
    )


def _cache(report: QuantizationReport) -> str:
    """What the KV cache costs, and each layer's largest heads."""
    series: dict[str, Points] = {
        label: [
            (i, value)
            for i, row in enumerate(report.attentions)
            if (value := getattr(row, column)) is not None
        ]
        for label, column in _CACHE_ERRORS
    }
    if not any(series.values()):
        return ""
    heading = "Relative error of the layer's output by the KV cache"
    plot = line_plot(series, heading, _ERROR)
    head = "".join(f"<th>{name}</th>" for name in ("layer", *(f"{x} by head" for x in "QKV")))
    body = []
    for row in report.attentions:
        heads = (row.q_head_amax, row.k_head_amax, row.v_head_amax)
        cells = "".join(f"<td>{_spread(values)}</td>" for values in heads)
        body.append(f"<tr><td>{escape(row.layer)}</td>{cells}</tr>")
    return (
        f"<h2>{heading}</h2><p>where the cache alone is in FP8: K and V by its one scale, and each "
        f"by its own</p>{plot}<h2>Heads</h2><p>the smallest, "
        "middle and largest amax of a layer's heads</p>"
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'
    )


def _spread(amax: tuple[float, ...]) -> str:
    """The smallest, middle and largest."""
    if not amax:
        return ""
    ordered = sorted(amax)
    picked = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
    return " · ".join(f"{value:.4g}" for value in picked)


def _table(report: QuantizationReport) -> str:
    rows = report.worst_first
    most = max((row.output_error for row in rows), default=0.0) or 1.0
    head = "".join(f"<th>{name}</th>" for name, _, _ in _COLUMNS)
    body = []
    for row in rows:
        cells, values = [], row.to_json()
        for _, column, form in _COLUMNS:
            value = values[column]
            if value is None:
                text = ""  # an older version did not measure it
            else:
                text = escape(value) if isinstance(value, str) else format(value, form)
            is_bar = column == "output_error"
            bar = f' class="bar" style="--w:{value / most:.0%}"' if is_bar else ""
            cells.append(f"<td{bar}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<h1>All linears, worst first</h1>"
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'
    )
