"""The socket that a server listens on: its own, or that of the process which starts it again."""

from __future__ import annotations

import os
import socket

from nvlm.program.errors import UserError

INHERITED = "NVLM_LISTENER"
"""The environment variable with the descriptor of a socket that listens already."""

_BACKLOG = 2048


def open_listener(host: str, port: int) -> socket.socket:
    """Raises `UserError` where the address cannot be listened on."""
    if (descriptor := os.environ.get(INHERITED)) is not None:
        listener = socket.socket(fileno=int(descriptor))
        listener.set_inheritable(False)
        return listener
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from None
