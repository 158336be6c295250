"""Which of Triton's own APIs a client may call: by default no more than asking needs.

Shared memory, trace, log and repository are for who runs the server. In Triton 2.51, the wheel's,
a client reaches the model's process through the first: decision 137 (docs/decisions/triton.md).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection

CLOSED_APIS = ("shared-memory", "model-repository", "trace", "logging")
"""As Triton 2.51 names them, the same over HTTP and gRPC."""

_HEADER = "nvlm-closed"


def closing_flags(open_apis: Collection[str] = ()) -> list[str]:
    """Flags of tritonserver. Triton lets in who knows the value of a header: it is drawn anew and
    given to nobody, and ends with a newline, which no header can hold, since `ps` shows it."""
    closed = ",".join(api for api in CLOSED_APIS if api not in open_apis)
    if not closed:
        return []
    rule = f"{closed}:{_HEADER}={secrets.token_hex(16)}\n"
    return [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
