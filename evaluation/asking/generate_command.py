"""`evaluate.py generate`: answers a benchmark with an engine directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.asking.task_run import DEFAULT_NUM_FRAMES, TaskRun
from evaluation.datasets.packed import is_packed
from evaluation.tasks import DEFAULT_MAX_NEW_TOKENS, TASKS, find_task
from nvlm.program.command_line import ArgumentParser, natural_int, positive_int
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.requests.flags import add_request_flags, request_of
from runtime.serving.launch import add_engine_flags
from runtime.serving.runner import Runner

EXIT_SOME_FAILED = 1
_ONLY_OF_TASKS = {"split": ("MMMU", "MathVista"), "num_frames": ("VideoMME",)}


def add_flags(parser: ArgumentParser) -> None:
    add_engine_flags(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--task", required=True, action="once", help=f"benchmark: one of {', '.join(TASKS)}")
    add(
        "--input_image_path",
        type=Path,
        metavar="DIR",
        help="folder of the benchmark's images, videos or parquet files",
    )
    add(
        "--gt_path",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of the benchmark's questions",
    )
    add(
        "--split",
        help="split to ask, for MMMU, MathVista and copies from the hub (defaults: "
        "docs/evaluation.md)",
    )
    add(
        "--num_frames",
        type=positive_int,
        metavar="N",
        help=f"frames of each video (default: {DEFAULT_NUM_FRAMES}), at most the engine's "
        "--max_num_images",
    )
    add(
        "--output_path",
        type=Path,
        metavar="PREFIX",
        help="how the names of the answer files begin, such as /results/fp8",
    )
    add = parser.add_argument_group(
        "shares", "Several processes answer a benchmark together."
    ).add_argument
    add(
        "--num_partitions", type=natural_int, metavar="N", help="shares of the records (default: 1)"
    )
    add(
        "--partition_id", type=natural_int, metavar="N", help="share to answer, from 0 (default: 0)"
    )
    add(
        "--num_samples_per_partition",
        type=positive_int,
        metavar="N",
        help="answer this number of records instead of a whole share (default: off)",
    )
    add_request_flags(parser, prompt_format="megatron", max_new_tokens=DEFAULT_MAX_NEW_TOKENS)


def check_flags(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    task = find_task(arguments.task)
    has_own_folder = bool(arguments.gt_path) and (
        task.name == "custom" or all(map(is_packed, arguments.gt_path))
    )
    if arguments.input_image_path is None and not has_own_folder:
        raise UserError("--task needs --input_image_path; give the folder of its images")
    if arguments.output_path is None:
        raise UserError("--task needs --output_path; give how the names of its answers begin")
    is_copy = not arguments.gt_path and (
        task.gt_file == "packed" and _holds_parquet(arguments.input_image_path)
    )
    if task.gt_file != "none" and not arguments.gt_path and not is_copy:
        copy = ", or a copy from the hub as --input_image_path" if task.gt_file == "packed" else ""
        raise UserError(f"--task {task.name} needs --gt_path, the benchmark's questions{copy}")
    if task.gt_file == "none" and arguments.gt_path:
        raise UserError(
            f"--gt_path does not go with --task {task.name}: the parquet files of "
            "--input_image_path hold questions and answers; leave it out"
        )
    if len(set(arguments.gt_path)) < len(arguments.gt_path):
        raise UserError("--gt_path names a file twice; give each once, its samples count once")
    if arguments.max_num_tiles and task.max_num_tiles:
        raise UserError(
            f"--max_num_tiles does not go with --task {task.name}, whose images are of "
            f"{task.max_num_tiles} tile each; leave it out"
        )
    for name, tasks in _ONLY_OF_TASKS.items():
        if name == "split" and is_copy:
            continue
        if given[name] is not None and task.name not in tasks:
            raise UserError(
                f"--{name} goes with --task {' or '.join(tasks)}; {task.name} has no use for it"
            )


def _holds_parquet(folder: Path) -> bool:
    """In itself, `data` or a folder of one of its parts (DocVQA)."""
    return any(True for pattern in ("*.parquet", "*/*.parquet") for _ in folder.glob(pattern))


def lead(
    arguments: argparse.Namespace, _device: torch.device, open_runner: Callable[[], Runner]
) -> int:
    """What rank 0 does, or the only one; returns the exit code."""
    task_run = TaskRun.read(arguments, request_of(arguments))
    task_run.check(EngineDir.read(arguments.engine_dir))
    with open_runner() as runner:
        return EXIT_SOME_FAILED if task_run.run(runner) else 0
