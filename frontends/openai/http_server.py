"""uvicorn on a thread of its own: it answers probes while the engine is being loaded."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from frontends.openai.protocol import Timeouts, timed

_MOST_HEADER_BYTES = 64 << 10


class HttpServer:
    """Answers on `listener`, which it closes; a context that ends with its connections closed."""

    def __init__(self, app: ASGIApp, listener: socket.socket, timeouts: Timeouts) -> None:
        self._socket = listener
        config = uvicorn.Config(
            app,
            http=timed(timeouts),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(timeouts.keep_alive),
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            proxy_headers=False,
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="nvlm-http")

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What is still being answered is cut off after a second."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))
