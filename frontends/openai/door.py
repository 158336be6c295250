"""What the endpoints share: the server of the engine, once it is open, and the operator's rules."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from frontends.openai.asking import Asked, Handover
from frontends.openai.errors import ApiError, FieldError, not_ready
from frontends.openai.requests.fields import Settings
from frontends.openai.requests.media import MediaRules
from frontends.openai.requests.messages import Turn, messages_of, pictures_of
from frontends.openai.requests.pictures import Picture
from nvlm.program.errors import UserError, shown
from runtime.requests.messages import ImageSource
from runtime.requests.types import GenerationRequest
from runtime.serving.loop import BusyError
from runtime.serving.prepare import check_num_images
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_NUM_THREADS = 8
"""They wait for other machines, and read the prompts of /tokenize."""

_DRAINING_BODY_S = 1.0
"""So long a body may still take once the server drains. Then it is refused, whole or not."""


@dataclass(frozen=True, slots=True)
class DoorOptions:
    """What the command line chooses of the door."""

    # Names that the model answers to, the first of which it calls itself.
    models: tuple[str, ...] = ("nvlm-d",)
    media: MediaRules = field(default_factory=MediaRules)  # which pictures may be fetched
    max_body_bytes: int = 64 << 20  # of one call
    max_open_bytes: int = 1 << 30  # of the bodies of all open calls
    body_timeout_s: float = 60.0  # from the headers to the end of the body
    logs_text: bool = False  # prompts and answers in the access log


class Door:
    """Any thread may call `open` and `drain` and read the properties, the event loop's the rest."""

    def __init__(self, options: DoorOptions) -> None:
        self.options = options
        self.created = int(time.time())
        self.num_calls = 0  # with a body, and not yet answered
        self._handover = Handover()
        self._server: Server | None = None
        self._is_draining = False
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "nvlm-http")
        self._preparing = ThreadPoolExecutor(1, "nvlm-looked-at")
        self._num_fetching = 0
        self._num_open_bytes = 0
        self._reported: set[str] = set()
        self._limits: dict[asyncio.Timeout, asyncio.AbstractEventLoop] = {}  # of bodies being read

    def open(self, server: Server) -> None:
        """Answers requests from now on."""
        self._server = server

    def drain(self) -> None:
        """Refuses requests from now on, half-sent ones too. Those that were accepted are
        answered."""
        self._is_draining = True
        for limit, loop in list(self._limits.items()):
            loop.call_soon_threadsafe(self._shorten, limit)

    def close(self) -> None:
        for pool in (self._threads, self._preparing):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def why_not_ready(self) -> str | None:
        """None when requests are answered."""
        if self._is_draining:
            return "the server is stopping; ask another"
        if self._server is None:
            return "the engine is being loaded; try again later"
        if self._server.has_failed:
            return "the decoder has failed; the server must be started again"
        return None

    @property
    def server(self) -> Server:
        """Raises `ApiError` where requests are not answered."""
        if (why := self.why_not_ready) is not None:
            raise not_ready(why)
        assert self._server is not None
        return self._server

    @property
    def opened_server(self) -> Server | None:
        """The server, also when it answers no more."""
        return self._server

    @property
    def runner(self) -> Runner:
        """Also while the server drains: what was accepted is answered. Raises `ApiError` before
        the engine is open."""
        if self._server is None:
            raise not_ready("the engine is being loaded; try again later")
        return self._server.runner

    @property
    def max_model_len(self) -> int:
        return self.runner.engine.limits.max_seq_len

    def require_model(self, name: str | None) -> str:
        """The model that a body names, which may leave it out. Raises `ApiError` for another."""
        if name is None:
            return self.options.models[0]
        if name not in self.options.models:
            raise ApiError(
                404,
                f"there is no model {shown(name)}, expected {' or '.join(self.options.models)}",
                param="model",
                code="model_not_found",
            )
        return name

    def hold(self, num_bytes: int, stack: ExitStack) -> None:
        """Counts bytes of a body until `stack` ends. Raises `BusyError` where all open calls have
        more than may be in memory; the only one may always continue."""
        self._num_open_bytes += num_bytes
        stack.callback(self._let_go, num_bytes)
        if self._num_open_bytes > self.options.max_open_bytes and self.num_calls > 1:
            raise BusyError("the server holds as many bytes of requests as it can; try again later")

    @contextmanager
    def reading(self, limit: asyncio.Timeout) -> Iterator[None]:
        """While a body is read, for `limit` at most: shorter once the server drains."""
        self._limits[limit] = asyncio.get_running_loop()
        try:
            if self._is_draining:
                self._shorten(limit)
            yield
        finally:
            del self._limits[limit]

    def _shorten(self, limit: asyncio.Timeout) -> None:
        if limit in self._limits:
            end = asyncio.get_running_loop().time() + _DRAINING_BODY_S
            limit.reschedule(min(end, limit.when() or end))

    def _let_go(self, num_bytes: int) -> None:
        self._num_open_bytes -= num_bytes

    def ask(self, request: GenerationRequest, stack: ExitStack, *, in_pieces: bool) -> Asked:
        """Submits a request, which is cancelled where `stack` ends before its answer does."""
        asked = self._handover.ask(self.server, request, in_pieces=in_pieces)
        return stack.enter_context(asked)

    async def request_of(self, turns: tuple[Turn, ...], settings: Settings) -> GenerationRequest:
        """A conversation, with its pictures fetched. Raises `FieldError`, and `BusyError` where
        fetching would be in vain."""
        engine, budget = self.runner.engine, self.runner.picture_budget
        pictures = pictures_of(turns)
        try:
            check_num_images(len(pictures), engine.limits)
        except UserError as error:
            raise FieldError("messages", str(error)) from None
        files = await self._fetch([each for each in pictures if not each.is_inline])
        most = settings.get("max_num_tiles", engine.tiling.max_num_tiles)

        def source(picture: Picture) -> ImageSource:
            return picture.source(files.get(picture), engine.tiling, most, budget)

        return GenerationRequest.from_messages(messages_of(turns, source), **settings)

    async def prepared(
        self, request: GenerationRequest, seen: Callable[[Ticket], _Result]
    ) -> _Result:
        """What `seen` makes of a request that is looked at and not asked. Those with pictures
        come one after the other: a picture may take hundreds of megabytes."""
        runner = self.runner

        def work() -> _Result:
            ticket = Ticket(request)
            runner.prepare(ticket)
            return seen(ticket)

        pool = self._preparing if request.num_images else self._threads
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def report_ignored(self, names: list[str]) -> None:
        """Once for each name."""
        if new := [name[:100] for name in names if name[:100] not in self._reported]:
            if len(self._reported) < 1000:
                self._reported.update(new)
            logger.warning("fields that nobody reads are ignored: %s", ", ".join(map(repr, new)))

    async def _fetch(self, pictures: list[Picture]) -> dict[Picture, bytes]:
        """One after the other: a request has one place in the pool of threads."""
        files: dict[Picture, bytes] = {}
        if not pictures:
            return files
        if self.server.is_full or self._num_fetching >= 4 * _NUM_THREADS:
            raise BusyError("the server is busy; try again later")
        self._num_fetching += 1
        try:
            for picture in pictures:
                try:
                    files[picture] = await self.in_thread(_fetching(self.options.media, picture))
                except UserError as error:
                    raise FieldError(picture.param, str(error)) from None
        finally:
            self._num_fetching -= 1
        return files


def _fetching(media: MediaRules, picture: Picture) -> Callable[[], bytes]:
    return lambda: media.fetch(picture.url)
