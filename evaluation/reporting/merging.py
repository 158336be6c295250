"""Answer lines of several files to one set: a sample counts once, and is the same in all of them.

Megatron-LM numbers samples without an id of their own (ChartQA, OCRBench) within a partition, so
its files of several partitions use the same ids for different samples. Their places in the whole
data set follow where every partition is there and complete; else they cannot be distinguished.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evaluation.asking.partition import partition_bounds
from evaluation.datasets.sample import SampleId
from evaluation.scoring.score import Line
from evaluation.tasks import Task
from nvlm.program.errors import UserError, shown

_PARTITION = re.compile(r"-partition=(\d+)")


@dataclass(frozen=True, slots=True)
class FoundLine:
    """An answer line, its id as written, and where it stands."""

    id: SampleId  # as written
    line: Line  # all its fields
    path: Path  # of the file
    number: int  # of the line, from 1

    @property
    def place(self) -> str:
        return f"{self.path} line {self.number}"


@dataclass(frozen=True, slots=True)
class Merged:
    lines: dict[SampleId, Line]  # by sample
    num_duplicates: int  # lines that repeat a sample of another file


def merge(task: Task, found: list[FoundLine], has_records: bool) -> Merged:
    """Ordered by id, since answers are written as they end. The first answer to a sample counts.
    Raises `UserError` where one id stands for several samples. Our files, which have records,
    count through the whole data set."""
    clash = _clash(task, ((line.id, line) for line in found))
    if clash is None:
        lines = {line.id: line.line for line in reversed(found)}
        ordered = sorted(lines, key=lambda i: (isinstance(i, str), i))
        return Merged({i: lines[i] for i in ordered}, len(found) - len(lines))
    first, second = clash
    problem = (
        f"{second.place} and {first.place} answer different {task.name} samples of the same id "
        f"{shown(first.id)}"
    )
    if has_records or (offsets := _offsets(found)) is None:
        raise UserError(
            f"{problem}; score the files one by one (--task and --input_path FILE), or give all "
            "partitions, each whole"
        )
    numbered = [(_numbered(line, offsets), line) for line in found]
    if _clash(task, numbered) is not None:
        raise UserError(f"{problem}; they are of several runs, score those apart")
    lines = {i: line.line for i, line in reversed(numbered)}
    return Merged({i: {**lines[i], "sample_id": i} for i in sorted(lines)}, len(found) - len(lines))


def _clash(
    task: Task, found: Iterable[tuple[SampleId, FoundLine]]
) -> tuple[FoundLine, FoundLine] | None:
    """Two lines of one id that differ in more than their answers."""
    first: dict[SampleId, FoundLine] = {}
    for sample_id, line in found:
        other = first.setdefault(sample_id, line)
        if other is not line and task.form.digest(other.line) != task.form.digest(line.line):
            return other, line
    return None


def _offsets(found: list[FoundLine]) -> dict[int, int] | None:
    """Partition -> position of its first sample, or None where that does not follow."""
    ids: dict[int, set[SampleId]] = defaultdict(set)
    for line in found:
        if (partition := _partition(line.path)) is None:
            return None
        ids[partition].add(line.id)
    sizes = [len(ids.get(partition, ())) for partition in range(len(ids))]
    if any(ids.get(partition) != set(range(size)) for partition, size in enumerate(sizes)):
        return None
    for each in (0, sizes[0]):  # shared evenly, or so many for each partition
        bounds = [partition_bounds(sum(sizes), len(sizes), k, each) for k in range(len(sizes))]
        if [end - first for first, end in bounds] == sizes:
            return {partition: first for partition, (first, _) in enumerate(bounds)}
    return None


def _numbered(line: FoundLine, offsets: dict[int, int]) -> int:
    partition = _partition(line.path)
    assert partition is not None, "the offsets are of all files"
    assert isinstance(line.id, int), "the offsets are of positions"
    return offsets[partition] + line.id


def _partition(path: Path) -> int | None:
    found = _PARTITION.search(path.name)
    return int(found[1]) if found else None
