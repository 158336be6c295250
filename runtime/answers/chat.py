"""A conversation line by line: questions from stdin, answers to stdout as they come.

In a terminal or over pipes. stdout carries the answers alone; a pipe gets no prompt.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

from nvlm.inputs.picture_source import picture_source
from nvlm.inputs.tiling import TiledImage
from nvlm.program.errors import UserError
from runtime.answers.cut_answer import warn_if_cut
from runtime.requests.messages import ImageSource, Message, num_images, question
from runtime.requests.types import GenerationRequest
from runtime.serving.prepare import check_num_images, tile_pages
from runtime.serving.runner import Runner

COMMANDS = "/image PATH, /clear, /quit"
_WELCOME = (
    "/image PATH shows a picture with the next question, /clear forgets the conversation, /quit "
    "ends it; Control-C stops an answer"
)


def chat(runner: Runner, defaults: GenerationRequest, images: Iterable[ImageSource] = ()) -> int:
    """Answers the lines of stdin until they end; returns how many were refused.

    defaults: the settings of every question. images: shown with the first one.
    """
    conversation = Chat(runner, defaults)
    for image in images:
        conversation.show(image)
    num_refused = 0
    for line in _lines():
        try:
            if not conversation.take(line):
                break
        except UserError as error:
            num_refused += 1
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return num_refused


class Chat:
    """The turns so far, and the pictures that wait for the next question. A line that is refused
    changes neither."""

    def __init__(self, runner: Runner, defaults: GenerationRequest) -> None:
        self._runner, self._defaults = runner, defaults
        self._history: tuple[Message, ...] = ()
        self._images: list[TiledImage] = []

    def take(self, line: str) -> bool:
        """Does what a line asks; False when that is to end. Raises `UserError` for what cannot be
        done."""
        command, _, rest = line.strip().partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self._answer(line)
        elif command == "/quit":
            return False
        elif command == "/clear":
            self._history, self._images = (), []
        elif command == "/image" and rest:
            self.show(picture_source(rest.strip()))
        elif command == "/image":
            raise UserError("/image names no picture; give /image PATH")
        else:
            raise UserError(
                f"there is no {command}, expected {COMMANDS}; a question that begins so begins "
                "with a space"
            )
        return True

    def show(self, image: ImageSource) -> None:
        """Cuts a picture now: it is read once, however many turns follow."""
        engine, defaults = self._runner.engine, self._defaults
        num_shown = len(self._images) + sum(num_images(turn.content) for turn in self._history)
        check_num_images(num_shown + 1, engine.limits)
        room = engine.limits.max_num_images - num_shown
        self._images += tile_pages(image, "the image", defaults, engine, room)

    def _answer(self, line: str) -> None:
        """Prints the answer as it comes. Control-C stops it, and what was said stays said."""
        content = question(line, self._images)
        request = replace(self._defaults, content=content, history=self._history)
        text, result = "", None
        with _stoppable() as is_stopped, closing(self._runner.stream(request)) as pieces:
            for piece in pieces:
                text += piece.text
                print(piece.text, end="", flush=True)
                result = piece.result
                if is_stopped():
                    break
        print(flush=True)
        if result is not None:
            warn_if_cut(request, result)
        self._history = (*self._history, Message("user", content), Message("assistant", (text,)))
        self._images = []


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Control-C is remembered; the second one ends the program as ever."""
    is_stopped = False

    def stop(*_: object) -> None:
        nonlocal is_stopped
        if is_stopped:
            raise KeyboardInterrupt
        is_stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: is_stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """The lines of stdin; a terminal is asked for each."""
    if sys.stdin is None:  # the caller closed it
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines by it
    print(_WELCOME, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
