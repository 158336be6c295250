"""The two forms of an answer line that Megatron-LM's run_text_generation.py writes."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from evaluation.datasets.records import RecordError, field
from evaluation.datasets.sample import Sample, SampleId
from evaluation.scoring.score import Line

FINISH_REASON = "finish_reason"
"""Beside the reference's fields: why the answer ended."""

_USERS_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


class LineForm(ABC):
    """Where a line holds id, question and answer. What reads a line raises `RecordError` where it
    is another's."""

    @abstractmethod
    def line(self, sample: Sample, prompt: str, answer: str) -> Line: ...

    @abstractmethod
    def id(self, line: Any) -> SampleId: ...

    @abstractmethod
    def question(self, line: Line) -> str:
        """What was asked, without the template around it and the marks of images."""

    @abstractmethod
    def without_answer(self, line: Line) -> Line: ...

    def digest(self, line: Line) -> bytes:
        """Hashes all that a line says beside the answer."""
        asked = {k: v for k, v in self.without_answer(line).items() if k != FINISH_REASON}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True)
class SampleLine(LineForm):
    """A sample with its answer."""

    answer_fields: tuple[str, ...]  # keys that all get the answer

    def line(self, sample: Sample, prompt: str, answer: str) -> Line:
        named = dict.fromkeys(self.answer_fields, answer)
        return {"sample_id": sample.id, "prompt": prompt, **named, **sample.fields}

    def id(self, line: Any) -> SampleId:
        sample_id: SampleId = field(line, "sample_id", (int, str))
        for name in self.answer_fields:
            field(line, name, str)
        return sample_id

    def question(self, line: Line) -> str:
        prompt = str(line.get("prompt", ""))
        turn = _USERS_TURN.search(prompt)
        return (turn[1] if turn else prompt).replace("<Image><image></Image>", "").strip()

    def without_answer(self, line: Line) -> Line:
        return {key: value for key, value in line.items() if key not in self.answer_fields}


ANSWER_LINE = SampleLine(("answer",))


@dataclass(frozen=True, slots=True)
class VideoLine(LineForm):
    """A video's record with the one question that was asked, and its response there."""

    def line(self, sample: Sample, prompt: str, answer: str) -> Line:
        (question,) = sample.fields["questions"]
        return {**sample.fields, "questions": [{**question, "response": answer}]}

    def id(self, line: Any) -> SampleId:
        questions = field(line, "questions", list)
        if len(questions) != 1:
            raise RecordError(f"has {len(questions)} questions, expected 1")
        field(questions[0], "response", str)
        sample_id: SampleId = field(questions[0], "question_id", (int, str))
        return sample_id

    def question(self, line: Line) -> str:
        return str(line["questions"][0].get("question", ""))

    def without_answer(self, line: Line) -> Line:
        (question,) = line["questions"]
        asked = {key: value for key, value in question.items() if key != "response"}
        return {**line, "questions": asked}
