"""What a reader of a task's score must know: sentences for the report."""

from __future__ import annotations

from evaluation.datasets.sample import SampleId
from evaluation.scoring.score import SampleScore, TaskScore
from evaluation.scoring.scored import Scored
from evaluation.scoring.vqa_text import normalize


def notes_on(scored: Scored) -> list[str]:
    notes = list(scored.notes)
    if scored.score and (empty := _empty_answers(scored.score)):
        notes.append(f"{empty}.")
    if number := scored.results.num_duplicates:
        notes.append(f"Left out, answers to samples that had one already: {number:,}.")
    return notes


def note_on_comparison(
    scored: Scored, other: Scored | None, not_compared: str | None
) -> str | None:
    """`other`: what it is compared with; `not_compared`: why it could not be."""
    if not_compared:
        return f"Not compared: {not_compared}."
    if other and (unlike := _what_differs(scored, other)):
        return f"Not the engines alone differ: {'; '.join(unlike)}."
    return None


def _empty_answers(score: TaskScore) -> str | None:
    """Count answers that say nothing, and those of them that the reference's rules call right.

    Its normalisation drops articles, so nothing and "the" equal the option "A" (AI2D, ANLS);
    MMMU's rule takes the first option where an answer names none. None where every answer says
    something.
    """
    samples = score.samples.values()
    num_empty = sum(not sample.answer.strip() for sample in samples)
    num_right = sum(sample.value > 0 and _says_nothing(sample) for sample in samples)
    if not num_empty and not num_right:
        return None
    text = f"Empty answers: {num_empty:,} of {len(samples):,}"
    if not num_right:
        return text
    return f"{text}; right by the reference's rules though they say nothing: {num_right:,}"


def _says_nothing(sample: SampleScore) -> bool:
    """Nothing is left but articles, and the truth is another word."""
    answer = _essence(sample.answer)
    return not normalize(sample.answer) and answer not in map(_essence, sample.truth)


def _essence(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _what_differs(ours: Scored, theirs: Scored) -> list[str]:
    """Name what parts two runs beside their engines: settings, images, questions, truths.

    A phrase for each difference, over the samples that both have. Files without a record are
    compared by their lines alone.
    """
    results, others = ours.results, theirs.results
    paired = [i for i in results.lines if i in others.lines]
    asked = results.task.form.question
    found = []
    if results.records and others.records:
        found += results.records[0].asked_otherwise(others.records[0])
        found += _images(ours, theirs, paired)
    found += _counted(
        "the question",
        [asked(results.lines[i]) != asked(others.lines[i]) for i in paired],
    )
    if ours.score and theirs.score:
        truths, other_truths = (
            [score.samples[i].truth for i in paired] for score in (ours.score, theirs.score)
        )
        found += _counted(
            "the ground truth",
            [a != b for a, b in zip(truths, other_truths, strict=True)],
        )
    return found


def _images(ours: Scored, theirs: Scored, paired: list[SampleId]) -> list[str]:
    """By the sizes of their files; by their folders where not all sizes are known."""
    sizes, other_sizes = (
        {i: size for record in scored.results.records for i, size in record.image_bytes.items()}
        for scored in (ours, theirs)
    )
    names = [str(i) for i in paired]
    known = [name for name in names if name in sizes and name in other_sizes]
    if found := _counted("the image", [sizes[name] != other_sizes[name] for name in known]):
        return found
    places = [str(scored.results.records[0].location.image_dir) for scored in (ours, theirs)]
    if len(known) < len(names) and places[0] != places[1]:
        return [f"perhaps the images, {places[0]} against {places[1]}"]
    return []


def _counted(what: str, differ: list[bool]) -> list[str]:
    return [f"{what} of {sum(differ):,} of {len(differ):,} samples"] if any(differ) else []
