"""What made the answers of a task, for the report: engine, date, settings, and how many are cut."""

from __future__ import annotations

from collections.abc import Iterable

from evaluation.asking.answer_lines import FINISH_REASON
from evaluation.reporting.results import Results

_DIGITS = 8  # digits of a digest


def made_by(results: Results) -> list[tuple[str, str]]:
    """(name, value) of what a reader needs to make these answers again; empty without a record."""
    if not results.records:
        return [("cut", cut(results))]
    record, settings = results.records[0], results.records[0].settings
    checkpoints = (each.checkpoint[:_DIGITS] for each in results.records)
    facts = {
        "engine": repr(record.engine),
        "checkpoint": _joined(checkpoints),
        "date": _joined(each.date for each in results.records),
        "weights": f"{settings['quant_algo'] or settings['dtype']}, decoder {settings['decoder']}",
        "KV cache": settings["kv_cache_quant_algo"] or settings["dtype"],
        "vision": settings["vision"],
        "prompt format": settings["prompt_format"],
        "tiles of a picture": f"{settings['max_num_tiles']} at most, and a thumbnail",
        "max_new_tokens": str(settings["max_new_tokens"]),
        "cut": cut(results),
    }
    return list(facts.items())


def _joined(values: Iterable[str]) -> str:
    return ", ".join(sorted({value or "unknown" for value in values}))


def cut(results: Results) -> str:
    """How many answers ended at max_new_tokens, unfinished."""
    reasons = [line.get(FINISH_REASON) for line in results.lines.values()]
    known = [reason for reason in reasons if reason is not None]
    if not known:
        return "unknown: the lines have no finish_reason"
    text = f"{sum(reason == 'length' for reason in known):,} of {len(known):,} answers"
    unknown = len(reasons) - len(known)
    return f"{text}, of {unknown:,} unknown" if unknown else text
