"""Names the rank that died and its phase, and ends the others if the launcher does not.

A launcher kills the surviving ranks within milliseconds, before they could say anything, so a
process of its own does: every rank holds a connection to it and sends the names of its phases. The
first one to close without leave is the rank that died. It imports little, to start fast.
"""

from __future__ import annotations

import os
import platform
import selectors
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nvlm.program.errors import UserError

_CONNECT_S = 5.0
_GRACE_S = 2.0  # for the launcher
_LEAVE, _ABORT = "leave", "abort"
_READY = b"+"  # every rank is connected
_LOST = b"?"  # a rank died
_END = b"!"


@dataclass(frozen=True, slots=True)
class Offer:
    """Where the watching process listens."""

    # The loopback if all ranks are on its machine, else every other address of it.
    addresses: tuple[str, ...]
    port: int  # TCP


class Watch:
    """One rank's connection to the watching process."""

    def __init__(self, connection: socket.socket, end_code: int) -> None:
        self._connection, self._end_code = connection, end_code
        self.has_lost_rank = False  # one died, and this one is ended soon
        self.local_address: str = connection.getsockname()[0]
        self.leader_address: str = connection.getpeername()[0]
        threading.Thread(target=self._end_with_others, daemon=True).start()

    @staticmethod
    def start(num_ranks: int, is_one_machine: bool) -> Offer:
        """Starts the watching process; it ends when every connection is closed."""
        addresses = tuple(a for a in interface_addresses().values() if not _is_loopback(a))
        if is_one_machine:
            addresses = ("127.0.0.1",)
        listener = socket.create_server((addresses[0] if is_one_machine else "", 0))
        subprocess.Popen(
            [sys.executable, "-m", "runtime.ranks.watch", str(listener.fileno()), str(num_ranks)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # what ends the ranks must not end it first
        )
        offer = Offer(addresses, listener.getsockname()[1])
        listener.close()
        return offer

    @classmethod
    def join(cls, offer: Offer, rank: int, end_code: int) -> Watch:
        """Connects by the first address that answers. Raises `UserError` if none does.

        end_code: this rank's exit code where another died and the launcher left this one alive."""
        for address in offer.addresses:
            try:
                connection = socket.create_connection((address, offer.port), timeout=_CONNECT_S)
            except OSError:
                continue
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(f"{rank}\n".encode())
            if connection.recv(1) != _READY:
                raise ConnectionError(f"the watching process ended before rank {rank} started")
            return cls(connection, end_code)
        raise UserError(
            f"{platform.node()} reaches rank 0 at none of its IPv4 addresses "
            f"({', '.join(offer.addresses)}), port {offer.port}; let the machines of a job connect "
            "to one another on every port"
        )

    def phase(self, name: str) -> None:
        with suppress(OSError):  # without the watching process the ranks run unwatched
            self._connection.sendall(f"{name}\n".encode())

    def leave(self) -> None:
        """Call this before a rank ends in order."""
        self.phase(_LEAVE)

    def abort(self) -> None:
        """Called before a rank that said why ends them all: who dies of that is not named."""
        self.phase(_ABORT)

    def _end_with_others(self) -> None:
        try:
            while received := self._connection.recv(1):
                self.has_lost_rank = True
                if received == _END:
                    os._exit(self._end_code)
        except OSError:
            return


def interface_addresses() -> dict[str, str]:
    """The (first) IPv4 address of every network interface of this machine."""
    import fcntl
    import struct

    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                reply = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue  # it has none
            addresses[name] = socket.inet_ntoa(reply[20:24])
    return addresses


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


@dataclass(slots=True)
class _Rank:
    number: str = ""  # as it said; empty before
    phase: str = "start"  # what it was doing when it last said so
    received: bytes = b""  # bytes of a line that is not complete

    def take(self, data: bytes) -> None:
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            if self.number:
                self.phase = line.decode()
            else:
                self.number = line.decode()


def watch(listener: socket.socket, num_ranks: int) -> None:
    """Until every rank left, or one died: then it is named and the others are ended."""
    ranks: dict[socket.socket, _Rank] = {}
    with selectors.DefaultSelector() as selector:
        listener.settimeout(60)
        for _ in range(num_ranks):
            connection, _ = listener.accept()
            ranks[connection] = _Rank()
            selector.register(connection, selectors.EVENT_READ)
        for connection in ranks:
            connection.sendall(_READY)
        while ranks:
            closed = [key.fileobj for key, _ in selector.select() if not _read(key, ranks)]
            dead = []
            for source in closed:
                assert isinstance(source, socket.socket)
                selector.unregister(source)
                rank = ranks.pop(source)
                if rank.phase != _LEAVE:
                    dead.append(f"rank {rank.number} died in phase {rank.phase}")
            is_aborting = any(rank.phase == _ABORT for rank in ranks.values())
            if dead and not is_aborting:
                os.write(2, f"{', '.join(sorted(dead))}; ending the others\n".encode())
            if dead or is_aborting:
                _end(list(ranks))
                return


def _read(key: selectors.SelectorKey, ranks: dict[socket.socket, _Rank]) -> bool:
    """Takes what a rank sent; false where its connection is closed."""
    source = key.fileobj
    assert isinstance(source, socket.socket)
    try:
        data = source.recv(4096)
    except OSError:
        data = b""
    ranks[source].take(data)
    return bool(data)


def _end(connections: list[socket.socket]) -> None:
    """Those that the launcher leaves alive hear of it at once: a server answers no more."""
    _send(connections, _LOST)
    threading.Event().wait(_GRACE_S)
    _send(connections, _END)


def _send(connections: list[socket.socket], what: bytes) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.sendall(what)


if __name__ == "__main__":
    try:
        watch(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    except TimeoutError:
        os._exit(1)
