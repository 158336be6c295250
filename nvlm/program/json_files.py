"""JSON objects on disk: strict reading with one-line errors, atomic writing."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError, shown

_POINTER = b"version https://git-lfs"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`; `UserError` when it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a JSON file there") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if _is_pointer(path):
            raise UserError(
                f"{path} is a pointer of Git LFS, expected the JSON file itself; run git lfs pull"
            ) from None
        raise UserError(f"{path} is not valid JSON ({error}); expected one whole object") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def write_json_atomically(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` so that `path` is either absent, as before, or complete."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_beside(path: Path, value: dict[str, Any], flag: str) -> None:
    """As `write_json_atomically`, beside what `flag` names. Raises `UserError` where it cannot."""
    try:
        write_json_atomically(path, value)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; choose another {flag}"
        ) from None


def write_text_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` is either absent, as before, or complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the folder is not there
            temporary.unlink()
        raise


_TOO_LARGE = 1 << 40
"""No size, and no other number of a model, comes near."""


class StrictReader:
    """Reads named keys of one JSON object and names file and key in every complaint."""

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def _where(self, key: str) -> str:
        return f"{self.path}: {self.prefix}{key}"

    def section(self, key: str) -> StrictReader:
        value = self._get(key)
        if not isinstance(value, dict):
            raise UserError(f"{self._where(key)} is {shown(value)}, expected an object")
        return StrictReader(value, self.path, f"{self.prefix}{key}.")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"{self._where(key)} is missing; expected it there")
        return self.values[key]

    def positive_int(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _TOO_LARGE:
            raise UserError(f"{self._where(key)} is {shown(value)}, expected a positive integer")
        return value

    def bounded_int(self, key: str, most: int, least: int = 1) -> int:
        """A whole number from `least` to `most`."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.unsupported(key, f"a whole number from {least} to {most}")
        return value

    def only(self, *names: str) -> StrictReader:
        """Itself. Refuses an object with another key than `names`."""
        if unknown := sorted(self.values.keys() - set(names)):
            raise UserError(f"{self._where(shown(unknown[0]))} is no key of this version")
        return self

    def positive_float(self, key: str) -> float:
        value = self._get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < _TOO_LARGE
        ):
            raise UserError(f"{self._where(key)} is {shown(value)}, expected a positive number")
        return float(value)

    def require_multiple(self, key: str, factor: int, divisor_key: str) -> None:
        """`key` must be a multiple of `factor` times the value of `divisor_key`."""
        value, divisor = self.positive_int(key), factor * self.positive_int(divisor_key)
        if value % divisor:
            times = "" if factor == 1 else f"{factor} x "
            raise UserError(
                f"{self._where(key)} is {value}, expected a multiple of {divisor} "
                f"({times}{divisor_key})"
            )

    def one_of(self, key: str, supported: tuple[Any, ...], default: Any = ...) -> Any:
        """The value of `key`, which must be one of `supported`."""
        value = self.values.get(key, default) if default is not ... else self._get(key)
        if not any(value == choice and type(value) is type(choice) for choice in supported):
            raise self.unsupported(key, " or ".join(repr(choice) for choice in supported))
        return value

    def unsupported(self, key: str, expected: str) -> UserError:
        """The complaint about the value of `key`."""
        return UserError(
            f"{self._where(key)} is {shown(self.values.get(key))}, expected {expected}"
        )

    def refuse_unlike(self, expected: dict[str, Any]) -> None:
        """Refuses an object that says more, less or other than `expected`: one of our own format
        in which nothing is ignored."""
        for key in [*expected, *self.values]:
            found, wanted = self.values.get(key, ...), expected.get(key, ...)
            if found != wanted:
                is_now, should_be = (
                    "absent" if value is ... else shown(value) for value in (found, wanted)
                )
                raise UserError(f"{self._where(key)} is {is_now}, expected {should_be}")

    def string(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise UserError(f"{self._where(key)} is {shown(value)}, expected a string")
        return value
