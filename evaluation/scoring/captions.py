"""CIDEr of captions by pycocoevalcap, whose tokenizer is a Java program (evaluate_coco.py)."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

from evaluation.datasets.sample import SampleId
from evaluation.packages import require_package
from evaluation.scoring.score import Line, SampleScore, TaskScore, Truth
from nvlm.program.errors import UserError


def comparable_caption(caption: str) -> str:
    return caption.rstrip(".").lower()


def _tokenized(
    tokenize: Callable[[Any], dict[SampleId, list[str]]], captions: dict[SampleId, list[str]]
) -> dict[SampleId, list[str]]:
    """One line a caption, which is what the tokenizer counts."""
    lines = {i: [" ".join(text.split()) for text in texts] for i, texts in captions.items()}
    try:
        found = tokenize({i: [{"caption": text} for text in texts] for i, texts in lines.items()})
    except OSError as error:  # it writes beside its jar
        raise UserError(f"CIDEr's tokenizer cannot run: {error}; fix that") from None
    if [*map(len, found.values())] != [*map(len, lines.values())]:  # nor looks at Java's exit code
        raise UserError(
            f"CIDEr's tokenizer gave back {sum(map(len, found.values()))} of "
            f"{sum(map(len, lines.values()))} captions; `java -version` says whether Java works"
        )
    return found


def score_captions(lines: dict[SampleId, Line], truth: Truth) -> TaskScore:
    """Over the images that have an answer; document frequencies come from their captions."""
    tokenizer = require_package("pycocoevalcap.tokenizer.ptbtokenizer", "pycocoevalcap", "CIDEr")
    cider = require_package("pycocoevalcap.cider.cider", "pycocoevalcap", "CIDEr")
    if shutil.which("java") is None:
        raise UserError(
            "CIDEr needs Java for its tokenizer and found none; apt install default-jre"
        )
    truths = {
        sample_id: truth.answers.get(str(sample_id)) or line["ground_truth"]
        for sample_id, line in lines.items()
    }
    answers = {i: [comparable_caption(line["caption"])] for i, line in lines.items()}
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is no score
        tokenize = tokenizer.PTBTokenizer().tokenize
        expected, given = (_tokenized(tokenize, captions) for captions in (truths, answers))
        mean, each = cider.Cider().compute_score(expected, given)
    samples = {
        sample_id: SampleScore(float(value), lines[sample_id]["caption"], truths[sample_id])
        for sample_id, value in zip(expected, each, strict=True)
    }
    return TaskScore(100.0 * float(mean), samples)
