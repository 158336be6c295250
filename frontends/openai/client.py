"""The client of a call: reads the body that it sends, and notices when it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import ExitStack

from starlette.requests import Request
from starlette.types import Receive

from frontends.openai.door import Door
from frontends.openai.errors import ApiError, not_ready


class ClientGoneError(Exception):
    """The connection was closed before the answer was whole."""


async def read_body(request: Request, door: Door, stack: ExitStack) -> bytes:
    """Its bytes count among those of all open calls until `stack` ends. Raises `ApiError` for a
    body that is too large or too slow, or not whole when the server drains, `BusyError` and
    `ClientGoneError`."""
    try:
        async with asyncio.timeout(door.options.body_timeout_s) as limit:
            with door.reading(limit):
                return await _read(request, door, stack)
    except TimeoutError:
        refusal = ApiError(408, "the body did not come in time; send it again")
        if (why := door.why_not_ready) is not None:
            refusal = not_ready(why)
        refusal.headers["connection"] = "close"  # its rest may still come
        raise refusal from None


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Does `work` until the client is gone, which raises `ClientGoneError`."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, door: Door, stack: ExitStack) -> bytes:
    most = door.options.max_body_bytes
    too_large = ApiError(
        413, f"the body has more than {most:,} bytes, which is this server's limit"
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    data = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        data += part
        if len(data) > most:
            raise too_large
        door.hold(len(part), stack)
        if not message.get("more_body", False):
            return bytes(data)
