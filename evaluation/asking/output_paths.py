"""Names of the files around a prefix: Megatron-LM's, and ours beside them."""

from __future__ import annotations

import glob
from pathlib import Path

from evaluation.tasks import TASKS, Task


def answers_path(prefix: Path, task: Task, partition_id: int) -> Path:
    """dprank is the rank in Megatron-LM's data parallel group; partitions are ours."""
    return Path(f"{prefix}-{task.name}-dprank=0-partition={partition_id}.jsonl")


def task_in_name(answers: Path) -> Task | None:
    """Whose answers a file of Megatron-LM's naming holds; None for another name."""
    named = [task for task in TASKS.values() if f"-{task.name}-dprank=" in answers.name]
    return named[0] if len(named) == 1 else None


def answers_paths(prefix: Path, task: Task) -> list[Path]:
    """A file given by its own name, or all partitions and ranks of a prefix."""
    if prefix.is_file():
        return [prefix]
    pattern = f"{glob.escape(f'{prefix}-{task.name}')}-dprank=*-partition=*.jsonl"
    return [Path(name) for name in sorted(glob.glob(pattern))]


def tasks_of(prefix: Path) -> list[Task]:
    """Every task that has answers at a prefix."""
    return [task for task in TASKS.values() if not prefix.is_file() and answers_paths(prefix, task)]


def record_path(answers: Path) -> Path:
    return answers.with_suffix(".run.json")


def derived_path(prefix: Path, task: Task, what: str) -> Path:
    """PREFIX-TextVQA-merged.json; x-merged.json for a file x.jsonl."""
    if prefix.is_file():
        return prefix.with_name(f"{prefix.stem}-{what}.json")
    return Path(f"{prefix}-{task.name}-{what}.json")
