"""The report as one HTML file that opens anywhere: table, tasks, and a gallery to look through."""

from __future__ import annotations

from html import escape
from pathlib import Path

from evaluation.reporting.compare import Comparison
from evaluation.reporting.gallery import HOW_CHOSEN, GalleryItem
from evaluation.reporting.provenance import made_by
from evaluation.reporting.report import (
    MAX_CHANGES,
    UNITS,
    Report,
    TaskReport,
    change_columns,
    change_rows,
    comparison_sentence,
    headline,
)
from nvlm.program.html_policy import policy_tag

_STYLE = Path(__file__).with_name("report_page.css")
_SCRIPT = Path(__file__).with_name("report_page.js")


def page(report: Report) -> str:
    gallery = [item for task in report.tasks for item in task.gallery]
    parts = [
        "<header><h1>Evaluation</h1>",
        f"<p>{escape(report.name)}",
        f" beside {escape(', '.join(report.other_names))}" if report.other_names else "",
        "</p></header>",
        _table(report),
        _problems(report.failures),
        '<section class="tasks">',
        *(_task(task, report) for task in report.tasks),
        "</section>",
        _gallery(gallery) if gallery else "",
    ]
    script = _SCRIPT.read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{policy_tag(script)}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation: {escape(report.name)}</title>"
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style>"
        f"<body>{''.join(parts)}"
        f"<script>{script}</script></body></html>\n"
    )


def _table(report: Report) -> str:
    table = report.table
    num_ours = len(table.rows) - table.num_published
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in table.columns)
    body = ""
    for number, row in enumerate(table.rows):
        kind = "ours" if number < num_ours else "card" if number == num_ours else "published"
        first, *cells = row
        body += f'<tr class="{kind}"><th scope="row">{escape(first)}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return (
        f'<div class="scroll"><table id="card"><thead><tr>{head}</tr></thead><tbody>{body}'
        '</tbody></table></div><p class="note">'
        f"Rows below the line: {escape(table.source)}. {UNITS}</p>"
        + "".join(f'<p class="note">{escape(scope)}</p>' for scope in report.scopes)
    )


def _task(task: TaskReport, report: Report) -> str:
    parts = [f"<article><h2>{escape(task.name)}</h2>", f"<p>{escape(headline(task))}</p>"]
    facts = "; ".join(f"{name} {value}" for name, value in made_by(task.results))
    parts.append(f'<p class="note">{escape(facts)}</p>')
    for name, comparison in report.compared(task):
        sentence = report.against(name) + comparison_sentence(comparison, task.results.task.unit)
        parts.append(_difference(comparison, sentence))
    parts += [f'<p class="note">{escape(note)}</p>' for note in task.notes]
    parts.append(_problems(task.problems))
    if task.score and task.score.details:
        most = 100.0 if task.results.task.unit == "%" else max(task.score.details.values()) or 1.0
        parts.append("<dl>")
        for name, value in task.score.details.items():
            width = f"{min(value / most, 1.0):.1%}"
            parts.append(f'<dt>{escape(name)}</dt><dd style="--w:{width}"><b>{value:.1f}</b></dd>')
        parts.append("</dl>")
    for name, comparison in report.compared(task):
        if comparison.changes:
            parts.append(_changes(task, comparison, report, name))
    return "".join([*parts, "</article>"])


def _problems(problems: list[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<ul class="problems">{items}</ul>'


def _difference(comparison: Comparison, sentence: str) -> str:
    """The sentence, and the interval of the difference on a line through zero."""
    reach = max(map(abs, comparison.interval))
    low, middle, high = (
        50 + 45 * value / reach
        for value in (comparison.interval[0], comparison.difference, comparison.interval[1])
    )
    return (
        f"<p>{escape(sentence)}</p>"
        '<svg class="interval" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="difference {comparison.difference:+.2f}">'
        '<line class="zero" x1="50" x2="50" y1="0" y2="10"/>'
        f'<line class="range" x1="{low:.2f}" x2="{high:.2f}" y1="5" y2="5"/>'
        f'<line class="value" x1="{middle:.2f}" x2="{middle:.2f}" y1="1" y2="9"/></svg>'
    )


def _changes(task: TaskReport, comparison: Comparison, report: Report, other_name: str) -> str:
    columns = change_columns(report.name, other_name)
    head = "".join(f"<th>{escape(title)}" for title in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in change_rows(task, comparison)
    )
    more = len(comparison.changes) - MAX_CHANGES
    return (
        f"<details><summary>{escape(report.against(other_name))}answers that differ: "
        f"{len(comparison.changes)}</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{f'<p>and {more} more</p>' if more > 0 else ''}</details>"
    )


def _gallery(items: list[GalleryItem]) -> str:
    tasks = sorted({item.task for item in items})
    return (
        f'<section id="gallery"><h2>Samples</h2><p class="note">{escape(HOW_CHOSEN)}</p>'
        '<nav aria-label="Filter">'
        + _buttons("task", ["all", *tasks])
        + _buttons("verdict", ["all", "right", "partly", "wrong", "changed"])
        + f'<output>{len(items)} samples</output></nav><div class="cards">'
        + "".join(map(_card, items))
        + '</div><dialog><button type="button" aria-label="Close">×</button><img alt=""></dialog>'
        "</section>"
    )


def _buttons(kind: str, names: list[str]) -> str:
    return (
        '<span class="group">'
        + "".join(
            f'<button type="button" data-kind="{kind}" data-value="{name}" '
            f'aria-pressed="{"true" if name == "all" else "false"}">{name}</button>'
            for name in names
        )
        + "</span>"
    )


def _card(item: GalleryItem) -> str:
    changed = item.other_answer is not None
    if item.picture is None:
        picture = f'<p class="problem">{escape(item.problem or "")}</p>'
    else:
        label = f"{item.num_tiles} tile" + ("s" if item.num_tiles != 1 else "")
        picture = (
            f'<button type="button" class="picture" title="Show the {label} the model saw">'
            f'<img decoding="async" src="{item.picture}" alt="sample {escape(str(item.id))}">'
            f'<img decoding="async" class="tiles" src="{item.tiles}" alt="its tiles">'
            f"<small>{label}</small></button>"
        )
    rows: list[tuple[str, str, str]] = [
        ("answer", escape(item.score.answer) or "<i>nothing</i>", item.verdict)
    ]
    if item.other_answer is not None:
        rows.append(("other", escape(item.other_answer) or "<i>nothing</i>", ""))
    rows.append(("truth", escape(" / ".join(dict.fromkeys(item.score.truth))), ""))
    facts = "".join(f'<dt>{name}</dt><dd class="{kind}">{value}</dd>' for name, value, kind in rows)
    return (
        f'<figure data-task="{escape(item.task)}" data-verdict="{item.verdict}" '
        f'data-changed="{str(changed).lower()}">{picture}<figcaption>'
        f"<header><span>{escape(item.task)} {escape(str(item.id))}</span>"
        f'<mark class="{item.verdict}">{item.verdict}</mark></header>'
        f"<p>{escape(item.question)}</p><dl>{facts}</dl></figcaption></figure>"
    )
