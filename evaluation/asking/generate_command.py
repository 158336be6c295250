"""`evaluate.py generate`: answers a benchmark with an engine directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.asking.task_run import DEFAULT_NUM_FRAMES, TaskRun
from evaluation.tasks import DEFAULT_MAX_NEW_TOKENS, TASKS, find_task
from nvlm.program.command_line import ArgumentParser, natural_int, positive_int
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.requests.flags import add_request_flags, request_of
from runtime.serving.launch import add_engine_flags
from runtime.serving.runner import Runner

EXIT_SOME_FAILED = 1
_NEEDED = ("input_image_path", "output_path")
_ONLY_OF_TASKS = {"split": ("MMMU", "MathVista"), "num_frames": ("VideoMME",)}


def add_flags(parser: ArgumentParser) -> None:
    add_engine_flags(parser)
    add = parser.add_argument
    add("--task", required=True, help=f"one of {', '.join(TASKS)}")
    add("--input_image_path", type=Path, metavar="DIR", help="its images, videos or parquet files")
    add("--gt_path", type=Path, nargs="+", default=[], metavar="FILE", help="its questions")
    add("--output_path", type=Path, metavar="PREFIX", help="of the files of answers")
    add("--num_partitions", type=natural_int, help="share the records among this many processes")
    add("--partition_id", type=natural_int, help="which share this is, from 0")
    add("--num_samples_per_partition", type=positive_int, help="take so many instead of a share")
    add("--split", help="of MMMU (default validation) and MathVista (default testmini)")
    add(
        "--num_frames",
        type=positive_int,
        help=f"of a video (default {DEFAULT_NUM_FRAMES}), at most the engine's --max_num_images",
    )
    add_request_flags(parser, prompt_format="megatron", max_new_tokens=DEFAULT_MAX_NEW_TOKENS)


def check_flags(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    for name in _NEEDED:
        if given[name] is None:
            raise UserError(f"--task needs --{name}")
    task = find_task(arguments.task)
    if task.gt_file == "needed" and not arguments.gt_path:
        raise UserError(f"--task {task.name} needs --gt_path, the benchmark's questions")
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
        if given[name] is not None and task.name not in tasks:
            raise UserError(
                f"--{name} goes with --task {' or '.join(tasks)}; {task.name} has no use for it"
            )


def lead(
    arguments: argparse.Namespace, _device: torch.device, open_runner: Callable[[], Runner]
) -> int:
    """What rank 0 does, or the only one; returns the exit code."""
    task_run = TaskRun.read(arguments, request_of(arguments))
    task_run.check(EngineDir.read(arguments.engine_dir))
    with open_runner() as runner:
        return EXIT_SOME_FAILED if task_run.run(runner) else 0
