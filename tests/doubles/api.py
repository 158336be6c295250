"""Classes and functions with the signatures of tests/data/trtllm_api.json, and no others."""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parents[1] / "data" / "trtllm_api.json"
_KINDS = {
    "positional_or_keyword": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "keyword_only": inspect.Parameter.KEYWORD_ONLY,
}


@cache
def manifest() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(_PATH.read_text())["symbols"]
    return values


@cache
def signature(symbol: str) -> inspect.Signature:
    entry = manifest()[symbol]
    parameters = [
        inspect.Parameter(
            row["name"],
            _KINDS[row["kind"]],
            default=inspect.Parameter.empty if row["default"] == "<required>" else row["default"],
        )
        for row in entry["params"]
    ]
    return inspect.Signature(parameters)


def bind(symbol: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Every parameter's value; `TypeError` for an unknown or missing one, as Python raises it."""
    try:
        bound = signature(symbol).bind(*arguments, **named)
    except TypeError as error:
        raise TypeError(f"{symbol}: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def function(symbol: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a double's function, which gets every parameter by name."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def checked(*arguments: Any, **named: Any) -> Any:
            return body(**bind(symbol, arguments, named))

        return checked

    return decorate


def method(symbol: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Calls `function` with what comes after `self`."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def checked(self: Any, *arguments: Any, **named: Any) -> Any:
            return body(self, **bind(symbol, arguments, named))

        return checked

    return decorate


def value_class(symbol: str) -> type:
    """A class that holds its constructor's arguments and lets no other attribute be set."""
    entry = manifest()[symbol]
    names = {row["name"] for row in entry["params"]} | set(entry.get("fields", ()))

    class Value:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            for name, value in bind(symbol, arguments, named).items():
                setattr(self, name, value)

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in names:
                raise AttributeError(f"{symbol} has no attribute {name}")
            object.__setattr__(self, name, value)

    Value.__name__ = Value.__qualname__ = symbol.rpartition(".")[2]
    return Value


def enum_class(symbol: str) -> type[enum.Enum]:
    members: list[str] = manifest()[symbol]["members"]
    return enum.Enum(symbol.rpartition(".")[2], members)  # type: ignore[return-value]
