"""What the load asks, and what each question is answered with when it is asked alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.conftest import TESTS

_PICTURES = ("pixel_1x1.png", "photo_36x36.png", "landscape_800x450.png", "rgb.jpg")


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    max_tokens: int
    pictures: tuple[Path, ...] = ()

    @property
    def files(self) -> list[bytes]:
        return [path.read_bytes() for path in self.pictures]


def make_questions(number: int = 20) -> list[Question]:
    """Questions of all kinds: no, one and three pictures, 5 tokens and more."""
    paths = tuple(TESTS / "data" / "images" / name for name in _PICTURES)
    return [
        Question(f"Question {i}?", 5 + 2 * i, paths[i % 2 : i % 2 + (0, 1, 0, 3)[i % 4]])
        for i in range(number)
    ]


def answers_alone(engine_dir: Path, questions: list[Question]) -> list[str]:
    with Runner.open(engine_dir, torch.device("cpu")) as runner:
        return [
            runner.generate(
                GenerationRequest.images_first(
                    question.text, question.pictures, max_new_tokens=question.max_tokens
                )
            ).text
            for question in questions
        ]
