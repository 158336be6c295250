"""How each task asks: the wording of Megatron-LM's branch NVLM-1.0, which the card was made with.

Every task has the system message "Answer the questions." (nvlm.inputs.prompt.DEFAULT_SYSTEM). Tasks
that are not in the branch (SPDocVQA, InfoVQA) are asked as its other short-answer tasks.
"""

from __future__ import annotations

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for provided image."
VIDEO = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def options_by_letter(options: list[str]) -> dict[str, str]:
    """A, B, C, ... -> option."""
    return dict(zip(LETTERS, options, strict=False))


def with_options(question: str, options: list[str]) -> str:
    """MathVista's and RealworldQA's multiple choice: "A. option" lines and the instruction."""
    lines = [f"{letter}. {option}\n" for letter, option in options_by_letter(options).items()]
    return f"{question}\n{''.join(lines)}{OPTION_LETTER}"


def mmmu_multiple_choice(question: str, options: list[str]) -> str:
    """configs/llava1.5.yaml of the MMMU repository (its quoted line breaks fold to one)."""
    lines = [f"({letter}) {option}\n" for letter, option in options_by_letter(options).items()]
    return f"{question}\n{''.join(lines)}\n{OPTION_LETTER}"


def short_answer(question: str) -> str:
    return f"{question}\n{SHORT_ANSWER}"


def video_question(question: str, choices: list[str]) -> str:
    return "".join(f"{line}\n" for line in (VIDEO, question, *choices))
