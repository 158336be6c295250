"""What parts two runs of a task beside their engines: settings, images, questions, truths."""

from __future__ import annotations

from evaluation.datasets.sample import SampleId
from evaluation.scoring.scored import Scored


def what_differs(ours: Scored, theirs: Scored) -> list[str]:
    """A phrase for each difference; of the samples that both have. Files without a record are
    compared by their lines alone."""
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
