"""What the entry scripts share: flags, one-line errors with exit code 2, the device."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from nvlm.program.errors import PartDiedError, UserError, shown
from nvlm.program.nearest import nearest
from nvlm.program.process import (
    ignore_pillows_warnings,
    set_up_log,
    set_up_signals,
    set_up_streams,
)

EXIT_USER_ERROR = 2
EXIT_PART_DIED = 3
EXIT_INTERRUPTED = 130


_OTHER_WORDS = {
    "--max_tokens": "--max_new_tokens",
    "--question": "--prompt",
    "--text": "--prompt",
}
"""What other programs call a flag."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default that is one value. None and switches need none, and a flag of several values
    names its own. The usage line has the required flags alone: the groups below it list all."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        actions = list(actions)
        shown = [action for action in actions if action.required or not action.option_strings]
        if len(actions) > len(shown) + 1:  # more than --help
            shown.append(argparse.Action([], "flags", nargs="*", metavar="flags"))
        super().add_usage(usage, shown, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or isinstance(action.default, (list, Path)):
            return action.help
        return super()._get_help_string(action)


class _Store(argparse.Action):
    """A flag of several values collects where it is given twice. Of one value the last counts, so
    that a script's setting can be overridden after it."""

    is_once = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, ArgumentParser)
        before = parser.given.get(self.dest, values)
        if self.is_once and before != values:
            raise UserError(
                f"{option_string} is given twice, with {shown(str(before))} and "
                f"{shown(str(values))}; give it once"
            )
        if isinstance(values, list):
            values = [*parser.given.get(self.dest, []), *values]
        parser.given[self.dest] = values
        setattr(namespace, self.dest, values)


class _StoreOnce(_Store):
    """`action="once"`, for what is asked: the first of two questions would be lost without a
    word."""

    is_once = True


class ArgumentParser(argparse.ArgumentParser):
    """Complains in one line, without the usage text; flags may not be abbreviated. What a flag does
    that is given twice: `_Store` and `_StoreOnce`."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.given: dict[str, Any] = {}  # the flags' values in this parse, by `dest`
        for name in (None, "store"):
            self.register("action", name, _Store)
        self.register("action", "once", _StoreOnce)

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        self.given.clear()
        return super().parse_known_args(*arguments, **keywords)

    def parse_args(self, *arguments: Any, **keywords: Any) -> Any:
        """Names the flag that an unknown one may have meant."""
        found, unknown = self.parse_known_args(*arguments, **keywords)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}"
                f"{nearest(name, self._flags(), _OTHER_WORDS)}"
            )
        return found

    def _flags(self) -> set[str]:
        """Its flags, and those of its subcommands."""
        names = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names.update(*(parser._flags() for parser in action.choices.values()))
        return names

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """argparse's own way from a word to a value; what is no number gets our own error."""
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            if action.type not in _NUMBERS:
                raise
            expected, example = _NUMBERS[action.type]
            flag = "/".join(action.option_strings) or action.dest
            raise UserError(
                f"{flag} is {shown(text)}, expected {expected}; give one, as in {flag} {example}"
            ) from None


def positive_int(text: str) -> int:
    value = natural_int(text)
    if value == 0:
        raise ValueError
    return value


def natural_int(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


def port_number(text: str) -> int:
    value = natural_int(text)
    if value > 65535:
        raise ValueError
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise ValueError
    return value


def natural_float(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise ValueError
    return value


def fraction(text: str) -> float:
    value = positive_float(text)
    if value >= 1.0:
        raise ValueError
    return value


_NUMBERS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "1"),
    float: ("a number", "0.5"),
    positive_int: ("a positive integer", "8"),
    natural_int: ("a whole number from 0", "0"),
    port_number: ("a port from 0 to 65535", "8000"),
    positive_float: ("a positive number", "0.5"),
    natural_float: ("a number from 0", "0"),
    fraction: ("a number between 0 and 1", "0.5"),
}
"""What a flag of each type expects, and an example."""


def run(
    main: Callable[[], int | None], *, rank: int = 0, end: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Runs an entry script's `main` and ends with its code (None is 0).

    The log goes to stderr, from rank 0 only except for errors. `end` takes other ranks along.
    """
    set_up_log(rank)
    ignore_pillows_warnings()
    set_up_streams()
    set_up_signals()
    try:
        code = main() or 0
        sys.stdout.flush()
        end(code)
    except (UserError, PartDiedError) as error:
        who = "error" if rank == 0 else f"rank {rank}: error"
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
        end(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_PART_DIED)
    except KeyboardInterrupt:
        if rank == 0:
            with suppress(OSError):  # a terminal that hung up
                print("interrupted", file=sys.stderr)
        end(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`run.py ... | head`). Keep the interpreter from
        # complaining again when it flushes stdout.
        _drop_stdout()
        end(1)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _drop_stdout()
        print("error: stdout cannot be written: its disk is full; free some", file=sys.stderr)
        end(EXIT_USER_ERROR)


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA GPU; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
