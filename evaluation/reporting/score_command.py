"""`evaluate.py score`: scores the answers of a benchmark and reports on them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from evaluation.asking.output_paths import task_in_name, tasks_of
from evaluation.reporting.compare import compare
from evaluation.reporting.gallery import gallery_location, make_gallery
from evaluation.reporting.notes import note_on_comparison, notes_on
from evaluation.reporting.report import (
    OtherRun,
    Report,
    TaskReport,
    markdown,
    report_json,
    run_name,
)
from evaluation.reporting.report_page import page
from evaluation.reporting.results import read_results
from evaluation.scoring.scored import Scored, score_results
from evaluation.tasks import TASKS, Task, find_task
from nvlm.program.command_line import EXIT_USER_ERROR, ArgumentParser, natural_int
from nvlm.program.errors import UserError
from nvlm.program.json_files import write_text_atomically

EXIT_INCOMPLETE = 1
DEFAULT_GALLERY_SIZE = 12


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("answers").add_argument
    add(
        "--input_path",
        type=Path,
        action="once",
        required=True,
        metavar="PREFIX",
        help="how the names of the answer files begin: --output_path of `generate`",
    )
    add(
        "--task",
        nargs="+",
        help=f"benchmarks to score, of {', '.join(TASKS)} (default: all that --input_path has)",
    )
    add(
        "--gt_path",
        type=Path,
        action="once",
        metavar="FILE",
        help="file for one task: MMMU's answers, captioning's captions, or all questions of VQAv2 "
        "for a submission (default: none)",
    )
    add(
        "--compare",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="--output_path of other runs to compare with: the report shows which answers changed, "
        "and whether by chance (default: none)",
    )
    add = parser.add_argument_group(
        "report",
        "By default a Markdown table is printed, and the answers of all shares are merged.",
    ).add_argument
    add("--json", action="store_true", help="print one JSON object instead of Markdown")
    add(
        "--report_dir",
        type=Path,
        metavar="DIR",
        help="folder for report.md and report.html (default: no report is written)",
    )
    add(
        "--gallery_size",
        metavar="N",
        type=natural_int,
        default=DEFAULT_GALLERY_SIZE,
        help="samples of each task that the report shows with their images",
    )
    add(
        "--input_image_path",
        type=Path,
        metavar="DIR",
        help="folder of the images for the report (default: where they were asked about)",
    )


def check_flags(arguments: argparse.Namespace, tasks: list[Task]) -> None:
    if arguments.gt_path and len(tasks) > 1:
        raise UserError(
            f"--gt_path goes with one --task, found {len(tasks)}; give the task whose file it is"
        )
    if arguments.gt_path and not tasks[0].scored_with_gt_path:
        takers = [task.name for task in TASKS.values() if task.scored_with_gt_path]
        raise UserError(
            f"--gt_path goes with --task {' or '.join(takers)}; the answer lines of "
            f"{tasks[0].name} hold what is right"
        )


def chosen_tasks(names: list[str] | None, prefix: Path) -> list[Task]:
    if names:
        tasks = list(dict.fromkeys(find_task(name).name for name in names))
        if prefix.is_file() and (named := task_in_name(prefix)) and tasks != [named.name]:
            raise UserError(
                f"--input_path {prefix} holds answers of {named.name} by its name and --task is "
                f"{', '.join(tasks)}; give --task {named.name}"
            )
        return [TASKS[name] for name in tasks]
    if prefix.is_file():
        raise UserError("--input_path is a single file; say whose it is with --task")
    if found := tasks_of(prefix):
        return found
    raise UserError(
        f"--input_path {prefix} has no answers (looked for {prefix}-<task>-dprank=*-partition=*"
        ".jsonl); give the --output_path of evaluate.py generate"
    )


def report_task(
    task: Task,
    prefix: Path,
    other_prefixes: list[Path],
    gt_path: Path | None,
    image_dir: Path | None,
    gallery_size: int,
) -> TaskReport:
    scored = score_results(read_results(prefix, task), gt_path)
    others = [_compared(scored, prefix, task, gt_path) for prefix in other_prefixes]
    comparison = others[0].comparison if others else None
    gallery = []
    location = gallery_location(scored.results, image_dir)
    if gallery_size and scored.score and location:
        try:
            gallery = make_gallery(scored.results, scored.score, comparison, location, gallery_size)
        except UserError as error:
            print(f"{task.name}: no gallery: {error}", file=sys.stderr)
    notes = notes_on(scored)
    for other in others:
        note = note_on_comparison(scored, other.scored, other.not_compared)
        if note is not None:
            notes.append(f"{other.prefix}: {note}" if len(others) > 1 else note)
    return TaskReport(scored, others, gallery, notes)


def _compared(scored: Scored, prefix: Path, task: Task, gt_path: Path | None) -> OtherRun:
    other = None
    try:
        other = score_results(read_results(prefix, task, "--compare"), gt_path)
        comparison = None
        if scored.score and other.score:
            comparison = compare(scored.score, other.score, task.unit)
        return OtherRun(prefix, other, comparison)
    except UserError as error:
        return OtherRun(prefix, other, not_compared=str(error))


def write_report(report: Report, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text_atomically(directory / "report.md", markdown(report))
        write_text_atomically(directory / "report.html", page(report))
    except OSError as error:
        raise UserError(
            f"--report_dir {directory} cannot be written: {error.strerror}; give a folder"
        ) from None
    print(f"{directory / 'report.html'}", file=sys.stderr)


def report_tasks(
    tasks: list[Task], arguments: argparse.Namespace
) -> tuple[list[TaskReport], list[str]]:
    """What can be scored, and why the others cannot; raises `UserError` where nothing can."""
    reports, failures = [], []
    for task in tasks:
        try:
            report = report_task(
                task,
                arguments.input_path,
                arguments.compare,
                arguments.gt_path,
                arguments.input_image_path,
                arguments.gallery_size if arguments.report_dir else 0,
            )
            reports.append(report)
        except UserError as error:
            if len(tasks) == 1:
                raise
            failures.append(f"{task.name} is not scored: {error}")
    if not reports:
        raise UserError(f"none of {len(tasks)} tasks can be scored; {'; '.join(failures)}")
    return reports, failures


def _other_name(reports: list[TaskReport], number: int, prefix: Path) -> str:
    """As the engine that its first task names; the prefix alone where no task could be read."""
    found = (task.others[number].scored for task in reports)
    first = next((scored for scored in found if scored), None)
    return prefix.name if first is None else run_name(first.results, prefix)


def score(arguments: argparse.Namespace) -> int:
    """Prints the report and returns the exit code."""
    tasks = chosen_tasks(arguments.task, arguments.input_path)
    check_flags(arguments, tasks)
    for other in arguments.compare:
        if not other.is_file() and not tasks_of(other):
            raise UserError(
                f"--compare {other} has no answers (looked for {other}-<task>-"
                "dprank=*-partition=*.jsonl); give the other run's --output_path"
            )
    prefixes = [arguments.input_path, *arguments.compare]
    if twice := [str(path) for path in arguments.compare if prefixes.count(path) > 1]:
        raise UserError(f"--compare names {twice[0]} twice, or as --input_path does; give it once")
    reports, failures = report_tasks(tasks, arguments)
    report = Report(
        run_name(reports[0].results, arguments.input_path),
        [_other_name(reports, number, path) for number, path in enumerate(arguments.compare)],
        reports,
        failures,
    )
    if arguments.report_dir:
        write_report(report, arguments.report_dir)
    print(json.dumps(report_json(report)) if arguments.json else markdown(report), end="\n")
    problems = [problem for task in reports for problem in task.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    missing = [
        f"{task.name} is not compared: {other.not_compared}"
        for task in reports
        for other in task.others
        if other.not_compared
    ]
    for failure in failures + missing:
        print(f"error: {failure}", file=sys.stderr)
    if failures or missing:
        return EXIT_USER_ERROR
    return EXIT_INCOMPLETE if problems else 0
