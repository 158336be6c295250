"""Pages that we write run the script that stands in them, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re

from nvlm.program.html_policy import policy_tag


def test_a_script_is_allowed_by_its_hash_alone() -> None:
    script = "document.title = 'caf\u00e9'"
    (found,) = re.findall(r"script-src 'sha256-([^']+)'", policy_tag(script))
    assert base64.b64decode(found) == hashlib.sha256(script.encode()).digest()
    assert "default-src 'none'" in policy_tag(script)


def test_a_page_without_a_script_runs_none() -> None:
    assert "script-src 'none'" in policy_tag()
