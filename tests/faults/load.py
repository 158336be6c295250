"""The load: clients that ask, err, cancel, dawdle and go away, all at once, for a while.

What they do is a door's (triton_door.py); this counts it and says what was answered wrongly.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

NUM_CLIENTS = 24


class GoneError(Exception):
    """The server's end of the connection closed, or it said that it cannot answer."""


class Door(Protocol):
    """deeds: what a client may do, by kind; `valid` kinds return what is wrong with the answer, or
    None. The others raise `AssertionError` where the server took what it must not take."""

    deeds: dict[str, Callable[[random.Random], str | None]]


@dataclass(slots=True)
class Tally:
    """What all clients saw together."""

    done: Counter[str] = field(default_factory=Counter)  # by kind
    wrong: list[str] = field(default_factory=list)
    gone: list[tuple[float, float]] = field(default_factory=list)  # begun and ended, monotonic
    in_flight: dict[int, tuple[float, str]] = field(default_factory=dict)  # by client: begun, kind
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return sum(self.done.values())

    def count(self, kind: str, wrong: str | None) -> None:
        with self._lock:
            self.done[kind] += 1
            if wrong is not None:
                self.wrong.append(f"{kind}: {wrong}")

    def since(self, moment: float) -> list[str]:
        """The kinds of requests without an answer that were in flight then."""
        return [kind for begun, kind in tuple(self.in_flight.values()) if begun <= moment]

    def lose(self, begun: float) -> None:
        with self._lock:
            self.gone.append((begun, time.monotonic()))


class Load:
    """`NUM_CLIENTS` threads from `start` to `stop`. Where `may_go` a server is allowed to go away
    under them, and a client tries again."""

    def __init__(self, door: Door, seed: int, *, may_go: bool = False) -> None:
        self.tally = Tally()
        self._door, self._seed, self._may_go = door, seed, may_go
        self._stops = threading.Event()
        self._pool = ThreadPoolExecutor(NUM_CLIENTS)

    def start(self) -> Load:
        self._clients = [self._pool.submit(self._client, number) for number in range(NUM_CLIENTS)]
        return self

    def stop(self) -> Tally:
        """Raises what a client met that the load does not expect."""
        self._stops.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()
        return self.tally

    def wait(self, seconds: float) -> None:
        """Or until a client has failed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not any(client.done() for client in self._clients):
            self._stops.wait(0.2)

    def wait_for(self, number: int) -> None:
        """Until so many more requests were answered, or a client has failed."""
        enough = self.tally.total + number
        while self.tally.total < enough and not any(client.done() for client in self._clients):
            self._stops.wait(0.05)

    def _client(self, number: int) -> None:
        choice = random.Random(f"{self._seed} {number}")
        kinds = list(self._door.deeds)
        while not self._stops.is_set():
            kind = choice.choice(kinds)
            begun = time.monotonic()
            self.tally.in_flight[number] = begun, kind
            try:
                self.tally.count(kind, self._door.deeds[kind](choice))
            except GoneError:
                if not self._may_go:
                    raise
                self.tally.lose(begun)
                self._stops.wait(0.2)
            finally:
                self.tally.in_flight.pop(number, None)
