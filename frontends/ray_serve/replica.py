"""A replica: an actor of Ray Serve that starts serve.py, and hands it what comes, and back.

Ray counts its open requests, which autoscaling and draining go by. It ends with its server, and
the server with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import aiohttp
from ray import serve

from frontends.ray_serve.server_process import ServerProcess
from nvlm.program.command_line import EXIT_PART_DIED

log = logging.getLogger(__name__)

_PROBE_S = 0.5
_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the ingress took it."""

    method: str  # of HTTP
    path: str  # with its query
    headers: tuple[tuple[str, str], ...]  # without a connection's
    body: bytes  # whole


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int  # of HTTP
    headers: tuple[tuple[str, str], ...]  # in order, without a connection's


_OF_A_CONNECTION = frozenset(
    {"connection", "date", "keep-alive", "server", "transfer-encoding", "x-request-id"}
)
"""Headers that each server sets itself; Ray's proxy names a request."""


class Replica:
    """command: serve.py with its flags, as `ServerProcess` takes it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = ServerProcess(command)
        self._is_closing = False
        self._url = f"http://127.0.0.1:{self._process.wait_until_ready()}"
        self._opened: aiohttp.ClientSession | None = None
        for watch in (self._end_with_server, self._end_with_health):
            threading.Thread(target=watch, daemon=True).start()

    async def answer(self, asked: Asked) -> AsyncGenerator[Head | bytes | None, None]:
        """None at once: it is here. Then a `Head`, then the bytes as they come. Closing the
        generator closes the connection, which cancels the request."""
        yield None
        async with self._session.request(
            asked.method,
            asked.path,
            headers=asked.headers,
            data=asked.body or None,
            allow_redirects=False,
        ) as response:
            headers = ((name.lower(), value) for name, value in response.headers.items())
            yield Head(
                response.status, tuple(each for each in headers if each[0] not in _OF_A_CONNECTION)
            )
            while data := await response.content.readany():
                yield data

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and what its /metrics says."""
        async with self._session.get("/metrics") as response:
            return serve.get_replica_context().replica_id.unique_id, await response.text()

    async def __del__(self) -> None:
        """Called by Ray Serve once what was open is answered."""
        self._is_closing = True
        if self._opened is not None:
            await self._opened.close()
        await asyncio.to_thread(self._process.close)

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Opened by the first request, in the event loop of all."""
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                self._url,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            )
        return self._opened

    def _end_with_server(self) -> None:
        self._end(f"serve.py ended with code {self._process.wait()}")

    def _end_with_health(self) -> None:
        """A server that has failed answers 503 at once, and would look idle to the router."""
        while True:
            time.sleep(_PROBE_S)
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=_PROBE_TIMEOUT_S).close()
            except urllib.error.HTTPError as error:
                self._end(f"the server's /health is {error.code}")
            except OSError:
                continue  # it ends, and its exit code says more; or the machine is busy

    def _end(self, reason: str) -> None:
        """Ray then sends nothing here, and starts another."""
        if not self._is_closing:
            log.error("this replica ends: %s", reason)
            os._exit(EXIT_PART_DIED)
