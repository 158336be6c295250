"""The page as one document, and the headers that hold a browser to it.

Its style and script stand in it, so it loads nothing; the policy lets nothing else run, and lets
the page ask this server alone (decision 141, docs/decisions/openai.md).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.responses import Response

from nvlm.program.html_policy import source_hash

_FOLDER = Path(__file__).parent
SCRIPTS = (
    *("elements.js", "server.js", "boxes.js", "picture.js", "copies.js", "attached.js"),
    *("conversation.js", "page.js", "events.js"),
)
"""In the order in which they stand in the document: each uses those before it."""


@cache
def document() -> str:
    return _read("page.html").replace("{style}", _style()).replace("{script}", _script())


@cache
def headers() -> dict[str, str]:
    policy = (
        "default-src 'none'",
        f"script-src {source_hash(_script())}",
        f"style-src {source_hash(_style())}",
        "img-src data:",
        "connect-src 'self'",
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        "require-trusted-types-for 'script'",  # text never becomes HTML, also by mistake
    )
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def page() -> Response:
    return Response(document(), media_type="text/html", headers=headers())


def _style() -> str:
    return f"\n{_read('page.css')}"


def _script() -> str:
    return "\n".join(('\n"use strict";', *map(_read, SCRIPTS)))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
