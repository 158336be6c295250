"""A benchmark through an engine into a file of answers."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evaluation.asking.generate import generate, task_prompt
from evaluation.asking.output_paths import answers_path, answers_paths, record_path
from evaluation.asking.partition import partition_bounds
from evaluation.asking.results_file import ResultsFile
from evaluation.asking.task_record import TaskRecord, task_settings
from evaluation.datasets.sample import DataSet, Location
from evaluation.packages import missing
from evaluation.tasks import Task, answer_line, find_task
from nvlm.program.errors import UserError
from runtime.answers.run_record import EngineId
from runtime.engine.engine_dir import EngineDir
from runtime.requests.sampling import check_target, non_neutral
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner

_MAX_NAMED = 20
DEFAULT_NUM_FRAMES = 8


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One partition of a benchmark to answer."""

    task: Task  # row of the benchmark
    location: Location  # where its data lies
    data: DataSet  # records of the partition
    num_records: int  # of the whole data set
    request: GenerationRequest  # how each record is asked
    output_path: Path  # how the names of the answer files begin
    partition_id: int  # from 0
    num_partitions: int  # of the whole data set
    num_samples_per_partition: int  # 0: the records are shared out evenly

    @classmethod
    def read(cls, arguments: argparse.Namespace, request: GenerationRequest) -> TaskRun:
        """Reads the data set; `request` has the flags that every request shares."""
        task = find_task(arguments.task)
        for name in ("n", "logprobs", "prompt_logprobs"):
            if name in non_neutral(request.sampling):
                raise UserError(f"--{name} has no place in a benchmark's answers; leave it out")
        location = Location(
            arguments.input_image_path or arguments.gt_path[0].parent,
            tuple(arguments.gt_path),
            arguments.split,
            arguments.num_frames or DEFAULT_NUM_FRAMES,
        )
        if not os.path.isdir(location.image_dir):
            raise UserError(
                f"--input_image_path {location.image_dir} is not a directory; give the one with "
                "the benchmark's images"
            )
        if not os.path.isdir(arguments.output_path.parent):
            raise UserError(
                f"--output_path {arguments.output_path} lies in no directory that exists; make "
                f"{arguments.output_path.parent} first"
            )
        if os.path.isdir(arguments.output_path):
            raise UserError(
                f"--output_path {arguments.output_path} is a directory, expected what the names of "
                f"the files of answers begin with; give {arguments.output_path}/run, say"
            )
        data = task.read(location)
        if not data.samples:
            where = " and ".join(map(str, location.gt_paths or (location.image_dir,)))
            problem = data.problems[0] if data.problems else "it has no record"
            raise UserError(
                f"--task {task.name} found no sample in {where}: {problem}; give the files that "
                "docs/evaluation.md names for this task"
            )
        _require_an_image(data, location)
        partition_id = arguments.partition_id or 0
        num_records = len(data.records)
        bounds = partition_bounds(
            num_records,
            arguments.num_partitions or 0,
            partition_id,
            arguments.num_samples_per_partition or 0,
        )
        return cls(
            task,
            location,
            data.part(*bounds),
            num_records,
            request,
            arguments.output_path,
            partition_id,
            max(arguments.num_partitions or 0, 1),
            arguments.num_samples_per_partition or 0,
        )

    def check(self, engine: EngineDir) -> None:
        """Refuses all that `run` would, before minutes go into loading the engine; logs what of the
        data set is no sample on stderr."""
        self._check_limits(engine)
        record = self._record(engine)
        for path in answers_paths(self.output_path, self.task):
            place = record_path(path)
            if place.is_file() and path.stat().st_size:
                record.require_same_shares(TaskRecord.read(place), place)
        path = answers_path(self.output_path, self.task, self.partition_id)
        if path.exists():
            with ResultsFile(path, self.task, self.data.samples) as file:
                self._require_same(file, path, record)
        _print_problems(self.data.problems)
        if names := missing(self.task.scored_with):
            print(
                f"answers of {self.task.name} cannot be scored here without {' and '.join(names)}"
                " (requirements/evaluation.txt, docs/evaluation.md)",
                file=sys.stderr,
            )

    def run(self, runner: Runner) -> int:
        """Answers what is not answered yet, logs what failed to stderr and returns how many, with
        what is no sample."""
        path = answers_path(self.output_path, self.task, self.partition_id)
        samples, problems = self.data.samples, self.data.problems
        started = time.perf_counter()
        with ResultsFile(path, self.task, samples) as file:
            record = self._record(runner.engine)
            self._require_same(file, path, record)
            record.write(record_path(path))
            before = len(file.finished)
            failures = generate(runner, self.task, samples, self.request, file)
            num_new = len(file.finished) - before
        seconds = time.perf_counter() - started
        _print_problems(failures)
        incomplete = self.data.incomplete
        print(
            f"{path}: {len(file.finished)} of {len(samples)} samples answered, {num_new} of "
            f"them now in {seconds:.1f} s ({num_new / seconds:.2f} a second), "
            f"{len(failures)} failed; records that are no samples: "
            f"{len(problems) - len(incomplete)}"
            + (f"; missing parts of the data set: {len(incomplete)}" if incomplete else ""),
            file=sys.stderr,
        )
        return len(failures) + len(problems)

    def _check_limits(self, engine: EngineDir) -> None:
        check_target(self.request.sampling, engine.decoder_target)
        most = engine.tiling.max_num_tiles
        if (self.request.max_num_tiles or 0) > most:
            raise UserError(
                f"--max_num_tiles is {self.request.max_num_tiles}, expected 1 to {most}, what the "
                "model has tags for; leave it out to take that"
            )
        num_images = max((len(sample.images) for sample in self.data.samples), default=0)
        most = engine.limits.max_num_images
        if num_images > most:
            raise UserError(
                f"--task {self.task.name} asks about {num_images} images at once and the engine "
                f"takes {most}; build it with --max_num_images {num_images} or give --num_frames"
            )

    def _record(self, engine: EngineDir) -> TaskRecord:
        samples = self.data.samples
        return TaskRecord(
            EngineId.of(engine),
            task_settings(
                engine, self.request, self.task.max_num_tiles or self.request.max_num_tiles
            ),
            self.task.name,
            {
                "input_image_path": str(self.location.image_dir.resolve()),
                "gt_path": [str(path.resolve()) for path in self.location.gt_paths],
                "split": self.location.split,
                "num_frames": self.location.num_frames,
            },
            self.partition_id,
            self.num_partitions,
            len(samples),
            {
                str(sample.id): num_bytes
                for sample in samples
                if (num_bytes := sample.num_image_bytes) is not None
            },
            self.num_samples_per_partition,
            self.num_records,
            len(self.data.problems) - len(self.data.incomplete),
            len(self.data.incomplete),
            str(engine.manifest.source.get("checkpoint_digest", "")),
            time.strftime("%Y-%m-%d"),
        )

    def _require_same(self, file: ResultsFile, path: Path, record: TaskRecord) -> None:
        """Refuses to resume answers that something else made."""
        if not file.finished:
            return
        place = record_path(path)
        if not place.exists():
            raise UserError(
                f"{path} holds answers and {place} is missing, so what made them is unknown; "
                "choose another --output_path"
            )
        earlier = TaskRecord.read(place)
        record.require_same(earlier, place)
        self._require_same_samples(path, file, earlier, record)

    def _require_same_samples(
        self, path: Path, file: ResultsFile, earlier: TaskRecord, record: TaskRecord
    ) -> None:
        """Refuses to resume where an answered sample is no longer what it was: another data set
        under the same names."""
        for sample in self.data.samples:
            if sample.id not in file.finished:
                continue
            line = answer_line(self.task, sample, task_prompt(sample, self.request), "")
            what = None
            if file.finished[sample.id] != self.task.form.digest(line):
                what = "its question or ground truth"
            elif record.differs_in_image(earlier, sample.id):
                what = "the size of its image"
            if what is not None:
                raise UserError(
                    f"{path} holds an answer to sample {sample.id} of another data set: {what} "
                    "was different then; choose another --output_path"
                )


def _require_an_image(data: DataSet, location: Location) -> None:
    """Names a missing one with its sample; where all are missing, the folder is another."""
    files = [file for sample in data.samples for file in sample.files]
    if files and not any(map(os.path.exists, files)):
        raise UserError(
            f"--input_image_path {location.image_dir} has none of the {len(files)} files that are "
            f"asked about, such as {files[0]}; give the folder that has them"
        )


def _print_problems(problems: list[str]) -> None:
    for problem in problems[:_MAX_NAMED]:
        print(problem, file=sys.stderr)
    if len(problems) > _MAX_NAMED:
        print(f"... and {len(problems) - _MAX_NAMED} more", file=sys.stderr)
