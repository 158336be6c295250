"""An answer that ends at max_new_tokens need not match its guide, and a warning says so."""

from __future__ import annotations

import logging

from runtime.requests.types import GenerationRequest, GenerationResult

log = logging.getLogger(__name__)


def warn_if_cut(request: GenerationRequest, result: GenerationResult) -> bool:
    """Whether any of the n answers was cut before it matched the guide; the log says so."""
    if request.guide is None:
        return False
    cut = [choice for choice in result.choices if choice.finish_reason == "length"]
    for choice in cut:
        log.warning(
            "the answer was cut after %d tokens and does not match %s; "
            "give a larger --max_new_tokens",
            len(choice.token_ids),
            request.guide.name,
        )
    return bool(cut)
