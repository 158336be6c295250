"""TextVQA, VQAv2, ChartQA, SPDocVQA and InfoVQA: a list of questions, an image each.

The keys are the benchmarks' own. VQAv2 is read as published (a questions file, with the annotations
as the second --gt_path where they are public) or in Megatron-LM's merged form. All of them are read
from the hub's parquet files and VLMEvalKit's TSV too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.datasets.packed import Packing, packed_records
from evaluation.datasets.prompts import short_answer
from evaluation.datasets.records import (
    Record,
    RecordError,
    collect,
    field,
    json_list,
    list_in,
    named_file,
    read_json,
    string_list,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from nvlm.program.errors import UserError, shown
from runtime.requests.messages import ImageSource

HIDDEN = [""]
"""The answers of a test split, as Megatron-LM writes them."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of a benchmark's fields, and of its copy on the hub (`Packing`)."""

    task: str  # name of the benchmark
    image: str  # key of the picture's file
    question: str  # key of the text
    answers: str  # key of the truth
    repositories: str  # pattern of the copy's names on the hub
    split: str  # of the copy, by default
    id: str | None = None  # key of the sample's id; None: its position in the file (or files)
    has_one_answer: bool = False  # always, as a benchmark does whose test split is public
    folder: str = ""  # of the split in the copy

    @property
    def packing(self) -> Packing:
        """The hub's columns, and VLMEvalKit's: index, question and answer."""
        columns = {
            self.question: (self.question, "question"),
            self.answers: (self.answers, "answers", "answer"),
        }
        if self.id is not None:
            columns[self.id] = (self.id, "index")
        numbers = () if self.id is None else (self.id,)
        return Packing(self.repositories, self.image, columns, self.split, self.folder, numbers)


TEXT_VQA = Keys(
    *("TextVQA", "image_id", "question", "answers", "lmms-lab/textvqa", "validation"),
    id="question_id",
)
VQA_V2 = Keys(
    *("VQAv2", "image", "question", "answer", "lmms-lab/VQAv2", "validation"), id="question_id"
)
CHART_QA = Keys(
    *("ChartQA", "imgname", "query", "label", "lmms-lab/ChartQA or HuggingFaceM4/ChartQA", "test"),
    has_one_answer=True,
)
SP_DOC_VQA = Keys(
    *("SPDocVQA", "image", "question", "answers", "lmms-lab/DocVQA", "validation"),
    id="questionId",
    folder="DocVQA",
)
INFO_VQA = Keys(
    *("InfoVQA", "image_local_name", "question", "answers", "lmms-lab/DocVQA", "validation"),
    id="questionId",
    folder="InfographicVQA",
)


def read_questions(location: Location, keys: Keys) -> DataSet:
    """Several files are one data set, one after the other (ChartQA: human and augmented)."""
    if (packed := packed_records(location, keys.packing, keys.task)) is not None:
        return _samples(packed[0], location.image_dir, keys, packed[1])
    records = [record for path in location.gt_paths for record in json_list(path, "data")]
    return _samples(records, location.image_dir, keys)


def read_vqa_v2(location: Location) -> DataSet:
    if (packed := packed_records(location, VQA_V2.packing, VQA_V2.task)) is not None:
        return _samples(packed[0], location.image_dir, VQA_V2, packed[1])
    questions = read_json(location.gt_paths[0])
    if isinstance(questions, dict) and "annotations" in questions and "questions" not in questions:
        raise UserError(
            f"--gt_path {location.gt_paths[0]} holds annotations, expected the questions file first"
            " and the annotations file after it"
        )
    if not (isinstance(questions, dict) and "questions" in questions):
        return read_questions(location, VQA_V2)
    records = list_in(questions, location.gt_paths[0], "questions")
    annotations = _annotations(location.gt_paths[1:])
    subtype = questions.get("data_subtype", "")

    def merged(record: Any) -> Any:
        """As Megatron-LM's list has it, or what is wrong with it."""
        try:
            image = _coco_name(field(record, "image_id", (int, str)), str(subtype))
            question_id = field(record, "question_id", (int, str))
            if annotations and question_id not in annotations:
                raise RecordError(f"has question_id {shown(question_id)}, which has no annotation")
            answer = annotations.get(question_id, HIDDEN)
        except RecordError as error:
            return error
        return {**record, "image": image, "answer": answer}

    records = [(where, merged(record)) for where, record in records]
    return _samples(records, location.image_dir, VQA_V2)


def _annotations(paths: Iterable[Path]) -> dict[Any, list[str]]:
    """question_id -> the people's answers."""
    answers = {}
    for path in paths:
        for where, record in json_list(path, "annotations"):
            try:
                people = field(record, "answers", list)
                given = [field(person, "answer", str) for person in people]
                answers[field(record, "question_id", (int, str))] = given
            except RecordError as error:
                raise UserError(
                    f"--gt_path {where} {error}; download the benchmark's file again"
                ) from None
    return answers


def _coco_name(image_id: int | str, subtype: str) -> str:
    """COCO_val2014_000000262148: test-dev2015 has the pictures of test2015."""
    split = "test2015" if subtype.startswith("test") else subtype or "val2014"
    return f"COCO_{split}_{image_id:0>12}"


def _samples(
    records: list[tuple[str, Any]], image_dir: Path, keys: Keys, incomplete: Iterable[str] = ()
) -> DataSet:
    def read(position: int, record: Record) -> Sample:
        image = find_image(image_dir, record, keys.image)
        question = short_answer(field(record, keys.question, str))
        sample_id = position if keys.id is None else field(record, keys.id, (int, str))
        answers = _answers(record, keys.answers)
        if keys.has_one_answer and (len(answers) != 1 or answers == HIDDEN):
            raise RecordError(
                f"has {keys.answers} {shown(record.get(keys.answers))}, expected one answer"
            )
        return Sample(sample_id, (image, "\n" + question), {"gt_answer": answers})

    return _of_one_split(collect(records, read, incomplete), keys)


def _of_one_split(data: DataSet, keys: Keys) -> DataSet:
    """A score is of public answers, a submission of hidden ones: a mixture could be neither."""
    num_hidden = sum(_is_hidden(sample) for sample in data.samples)
    if num_hidden in (0, len(data.samples)):
        return data

    def public(part: Sample | str) -> Sample | str:
        if isinstance(part, str) or not _is_hidden(part):
            return part
        return (
            f"sample {part.id} has no {keys.answers}, as in a test split, and others have; ask the "
            "splits apart"
        )

    return DataSet([[public(part) for part in record] for record in data.records], data.incomplete)


def _is_hidden(sample: Sample) -> bool:
    return bool(sample.fields["gt_answer"] == HIDDEN)


def _answers(record: Record, key: str) -> list[str]:
    """A test split has none, or an empty list, or empty strings; a single string counts as a
    list."""
    if record.get(key) in (None, []):
        return HIDDEN
    answers = [record[key]] if isinstance(record[key], str) else string_list(record, key)
    return answers if any(answers) else HIDDEN


def find_image(image_dir: Path, record: Record, key: str) -> ImageSource:
    """The picture in the record, or the file of that name, or with .jpg, or with .png; else of the
    last part of the name, where the pictures lie in one folder. Raises `RecordError` for a name
    that no file can have."""
    if isinstance(record, dict) and callable(picture := record.get(key)):
        return picture  # a packed row's
    name = str(field(record, key, (str, int)))
    names = [f"{name}{suffix}" for suffix in ("", ".jpg", ".png")]
    paths = [named_file(image_dir, {key: name}, key) for name in names]
    for path in (*paths, *(image_dir / path.name for path in paths)):
        if os.path.isfile(path):
            return path
    return paths[0] if paths[0].suffix else paths[1]
