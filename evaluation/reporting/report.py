"""The report as data and as Markdown: the card's table with our rows, then task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.reporting.card import Table, card_table, markdown_table, scope
from evaluation.reporting.compare import Comparison
from evaluation.reporting.gallery import GalleryItem
from evaluation.reporting.provenance import made_by
from evaluation.reporting.results import Results
from evaluation.scoring.score import TaskScore
from evaluation.scoring.scored import Scored

MAX_CHANGES = 20
UNITS = "Scores in percent, OCRBench in points of 1,000."


@dataclass(frozen=True, slots=True)
class OtherRun:
    """One task of a run that --compare names."""

    prefix: Path  # as --compare has it
    scored: Scored | None = None  # None: it could not be scored
    comparison: Comparison | None = None  # None: `not_compared` says why
    not_compared: str | None = None  # why it is not


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task of a run and of the runs that it is compared with."""

    scored: Scored  # this run's
    others: list[OtherRun] = field(default_factory=list)  # in the order of --compare
    gallery: list[GalleryItem] = field(default_factory=list)  # samples to show
    # What a reader of the score must know, beside the problems.
    notes: list[str] = field(default_factory=list)

    @property
    def results(self) -> Results:
        return self.scored.results

    @property
    def name(self) -> str:
        return self.results.task.name

    @property
    def score(self) -> TaskScore | None:
        return self.scored.score

    @property
    def problems(self) -> list[str]:
        found = list(self.results.problems)
        for other in self.others:
            found += other.scored.results.problems if other.scored else []
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """All tasks of a run."""

    name: str  # what its row of the table is called
    other_names: list[str]  # what the others' rows are called, in the order of each task's `others`
    tasks: list[TaskReport]  # in the order of the table
    failures: list[str] = field(default_factory=list)  # which tasks could not be scored, and why

    @property
    def _runs(self) -> list[tuple[str, list[Scored]]]:
        runs = [(self.name, [task.scored for task in self.tasks])]
        for number, name in enumerate(self.other_names):
            found = [task.others[number].scored for task in self.tasks]
            runs.append((name, [scored for scored in found if scored]))
        return [(name, scored) for name, scored in runs if scored]

    @property
    def table(self) -> Table:
        return card_table([(name, _values(scored)) for name, scored in self._runs])

    @property
    def scopes(self) -> list[str]:
        """What the numbers of each of our rows are of."""
        return [
            f"{name}: "
            + "; ".join(f"{each.results.task.name} {scope(each.results)}" for each in scored)
            for name, scored in self._runs
        ]

    def compared(self, task: TaskReport) -> list[tuple[str, Comparison]]:
        """A task's comparisons, each with the other run's name."""
        pairs = zip(self.other_names, task.others, strict=True)
        return [(name, other.comparison) for name, other in pairs if other.comparison]

    def against(self, name: str) -> str:
        """Begins a comparison's sentence where there are several."""
        return f"Against {name}: " if len(self.other_names) > 1 else ""


def _values(scored: Sequence[Scored]) -> dict[str, float]:
    return {each.results.task.name: each.score.value for each in scored if each.score}


def run_name(results: Results, prefix: Path) -> str:
    """The prefix's last part and what the engine was: fp8 (FP8, KV cache FP8)."""
    if not results.records:
        return prefix.name
    settings = results.records[0].settings
    weights = settings["quant_algo"] or settings["dtype"]
    cache = settings["kv_cache_quant_algo"] or settings["dtype"]
    return f"{prefix.name} ({weights}, KV cache {cache})"


def markdown(report: Report) -> str:
    table = report.table
    parts = [
        "# Evaluation\n",
        markdown_table(table.columns, table.rows),
        f"The last {table.num_published} rows: {table.source}. {UNITS}\n",
        "".join(f"- {scope}\n" for scope in report.scopes),
        *(f"- {failure}\n" for failure in report.failures),
        *(_task_markdown(task, report) for task in report.tasks),
    ]
    return "\n".join(parts)


def _task_markdown(task: TaskReport, report: Report) -> str:
    results = task.results
    facts = "; ".join(f"{name} {value}" for name, value in made_by(results))
    lines = [f"## {task.name}\n", headline(task) + "\n", f"Made by: {facts}.\n"]
    if bullets := [f"- {bullet}\n" for bullet in (*task.problems, *task.notes)]:
        lines.append("".join(bullets))
    if task.score and task.score.details:
        lines.append(
            markdown_table(
                ("part", "score"), [(n, f"{v:.2f}") for n, v in task.score.details.items()]
            )
        )
    for name, comparison in report.compared(task):
        lines.append(
            report.against(name) + comparison_sentence(comparison, results.task.unit) + "\n"
        )
        if comparison.changes:
            lines.append(_changes(task, comparison, report.name, name))
    return "\n".join(lines)


def headline(task: TaskReport) -> str:
    if task.score is None:
        return f"The truth is hidden: {task.scored.submission} is for the benchmark's server."
    unit = "" if task.results.task.unit == "%" else f" {task.results.task.unit}"
    percent = "%" if task.results.task.unit == "%" else ""
    return f"{task.score.value:.2f}{percent}{unit} over {scope(task.results)}"


def comparison_sentence(comparison: Comparison, unit: str) -> str:
    """The comparison in a sentence."""
    if comparison.p_value < 0.05:
        how_sure = "chance alone would hardly do this"
    elif comparison.num_better or comparison.num_worse:
        how_sure = "chance alone could do this: few samples, or a small difference"
    else:
        how_sure = "no score differs; the interval says what these samples cannot rule out"
    low, high = comparison.interval
    unit = "points" if unit == "%" else unit
    samples = "sample" if comparison.num_paired == 1 else "samples"
    return (
        f"{comparison.value:.2f} against {comparison.other_value:.2f} over "
        f"{comparison.num_paired:,} {samples}: {comparison.difference:+.2f} {unit}, 95 % interval "
        f"{low:+.2f} to {high:+.2f}, p = {comparison.p_value:.3g}: {how_sure}; "
        f"answers that differ: {len(comparison.changes)}, better {comparison.num_better}, "
        f"worse {comparison.num_worse}"
    )


def change_rows(task: TaskReport, comparison: Comparison) -> list[tuple[str, ...]]:
    """Rows of the first changes: sample, question, truth, both answers, gain."""
    assert task.score, "only what was compared has changes"
    return [
        (
            str(c.id),
            task.results.task.form.question(task.results.lines[c.id]),
            " / ".join(dict.fromkeys(task.score.samples[c.id].truth)),
            c.answer,
            c.other_answer,
            f"{c.gain:+.2f}",
        )
        for c in comparison.changes[:MAX_CHANGES]
    ]


def change_columns(name: str, other_name: str) -> tuple[str, ...]:
    return ("sample", "question", "truth", name, other_name, "gain")


def _changes(task: TaskReport, comparison: Comparison, name: str, other_name: str) -> str:
    columns = change_columns(name, other_name)
    rows = [tuple(map(_short, row)) for row in change_rows(task, comparison)]
    more = len(comparison.changes) - len(rows)
    return markdown_table(columns, rows) + (f"\nand {more} more\n" if more else "")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def report_json(report: Report) -> dict[str, Any]:
    return {
        "name": report.name,
        "other_names": report.other_names,
        "tasks": {task.name: _task_json(task, report) for task in report.tasks},
        "failures": report.failures,
    }


def _task_json(task: TaskReport, report: Report) -> dict[str, Any]:
    values: dict[str, Any] = {
        "score": task.score.value if task.score else None,
        "unit": task.results.task.unit,
        "num_samples": len(task.results.lines),
        "num_duplicates": task.results.num_duplicates,
        "data": scope(task.results),
        "problems": task.problems,
        "notes": task.notes,
        "made_by": dict(made_by(task.results)),
        "details": task.score.details if task.score else {},
        "submission": str(task.scored.submission) if task.scored.submission else None,
    }
    values["comparisons"] = [
        {
            "other_name": name,
            "score": comparison.value,
            "other_score": comparison.other_value,
            "difference": comparison.difference,
            "interval": list(comparison.interval),
            "p_value": comparison.p_value,
            "num_paired": comparison.num_paired,
            "num_better": comparison.num_better,
            "num_worse": comparison.num_worse,
            "changed": [change.id for change in comparison.changes],
        }
        for name, comparison in report.compared(task)
    ]
    return values
