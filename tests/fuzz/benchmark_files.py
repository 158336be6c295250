"""Benchmarks' truth files and the records of runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from evaluation.asking.output_paths import record_path
from evaluation.asking.task_record import TaskRecord
from evaluation.datasets.literal_list import literal_list
from evaluation.datasets.sample import Location
from evaluation.reporting.results import read_results
from evaluation.tasks import TASKS
from nvlm.program.errors import UserError
from runtime.answers.run_record import BATCH, RunRecord
from tests.fuzz.kind import Opened
from tests.fuzz.mutations import json_text, mutated_bytes
from tests.support import benchmarks
from tests.support.benchmarks import (
    Benchmark,
    encoded,
    run_record,
    short,
    write_answers,
    write_tsv,
)


def _packed(folder: Path) -> Benchmark:
    """VLMEvalKit's file, which holds its pictures; one row names the other's."""
    picture = base64.b64encode(encoded("51")["bytes"]).decode()
    rows = [
        {"index": 3, "image": "5", "question": 'What does "it"\nsay?', "answer": "51"},
        {"index": 5, "image": picture, "question": "Read it.", "answer": "['51', '52']"},
    ]
    return Benchmark("TextVQA", folder, (write_tsv(folder / "x.tsv", rows),), {})


_BUILDERS: tuple[Callable[[Path], Benchmark], ...] = (
    benchmarks.text_vqa,
    benchmarks.vqa_v2,
    benchmarks.chart_qa,
    benchmarks.doc_vqa,
    benchmarks.info_vqa,
    benchmarks.captioning,
    benchmarks.ocrbench,
    benchmarks.realworld_qa,
    benchmarks.math_vista,
    benchmarks.custom,
    _packed,
)
_CELLS = [b"['a', 'b']", b"[1, 2.5]", b'["it\'s", None]', b"[" * 40, b"-" * 40 + b"1"]


def open_truth_files(folder: Path) -> Opened:
    found = []
    for number, build in enumerate(_BUILDERS):
        place = folder / str(number)
        place.mkdir()
        found.append(build(place))
    strategies: list[Any] = [
        st.tuples(st.just(None), st.just(0), mutated_bytes(_CELLS)),
    ]
    for benchmark in found:
        for index, path in enumerate(benchmark.gt_paths):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".tsv"):
                where = (st.just(benchmark), st.just(index))
                strategies.append(st.tuples(*where, _texts(path)))

    def read(case: tuple[Benchmark | None, int, bytes]) -> None:
        benchmark, index, text = case
        if benchmark is None:
            literal_list(text.decode("utf-8", "replace"))
            return
        path = benchmark.gt_paths[index]
        right = path.read_bytes()
        path.write_bytes(text)
        try:
            split = TASKS[benchmark.task].default_split
            location = Location(benchmark.image_dir, benchmark.gt_paths, split)
            data = TASKS[benchmark.task].read(location)
            ids = [sample.id for sample in data.samples]
            assert len(ids) == len(set(ids))
            for sample in data.samples:
                assert isinstance(sample.text, str)
                assert (sample.num_image_bytes or 1) > 0
            assert all(len(message) < 1500 for message in data.problems)
            if not ids:
                raise UserError("every record is refused")
        finally:
            path.write_bytes(right)

    return Opened(st.one_of(*strategies), read)


def _texts(path: Path) -> Any:
    """Texts of a file: JSON, JSON lines, or anything."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return json_text([json.loads(data)])
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        return st.lists(json_text(lines), min_size=1, max_size=3).map(b"\n".join)
    return mutated_bytes([data])


def open_run_records(folder: Path) -> Opened:
    """As a rerun and as the report read them."""
    prefix = folder / "run"
    task = TASKS["TextVQA"]
    answers = [short(number, "4071", "4071") for number in range(3)]
    write_answers(prefix, "TextVQA", answers)
    (path,) = folder.glob("run-*.jsonl")
    place = record_path(path)
    run_record("TextVQA").write(place)
    seed = json.loads(place.read_text())
    batch = {**seed, "task": {}, "requests": ["a" * 16, None]}

    def read(text: bytes) -> None:
        place.write_bytes(text)
        refusal = None
        try:
            record = RunRecord.read(place, BATCH)
            assert all(isinstance(each, str | None) for each in record.requests)
            assert isinstance(record.decisive, dict)
        except UserError as error:
            refusal = error
        try:
            found = TaskRecord.read(place)
        except UserError:
            if refusal is not None:
                raise
            return
        assert 0 <= found.partition_id < found.num_partitions
        assert found.asked_otherwise(found) == []
        assert found.location.num_frames > 0
        read_results(prefix, task)

    return Opened(json_text([seed, batch]), read)
