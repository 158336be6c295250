"""What a page that we write may load and run: nothing but what stands in it."""

from __future__ import annotations

import base64
import hashlib


def source_hash(text: str) -> str:
    """By which a policy allows an inline script or style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def policy_tag(*scripts: str) -> str:
    """A Content-Security-Policy (W3C, level 3) for a page with these inline scripts."""
    allowed = " ".join(map(source_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
