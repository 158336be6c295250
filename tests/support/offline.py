"""Runs a command in a network of its own: localhost, and a name server that notes what is asked.

    unshare --map-root-user --net --mount --pid --fork python offline.py NOTES COMMAND...

The name server stands in /etc/resolv.conf, so it hears any library, one with a resolver of its own
too. It knows no name; a name that it was asked becomes a line of the file NOTES.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_HEADER_BYTES = 12
_NO_SUCH_NAME = 0x8183
_SIOCSIFFLAGS, _UP_AND_RUNNING = 0x8914, 0x41


def start_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP_AND_RUNNING))


def name_of(query: bytes) -> str:
    """The name that a DNS query asks for (RFC 1035, 4.1.2)."""
    labels, at = [], _HEADER_BYTES
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode(errors="replace"))
        at += 1 + length
    return ".".join(labels)


def note_queries(server: socket.socket, notes: Path) -> None:
    while True:
        query, client = server.recvfrom(4096)
        with open(notes, "a") as file:
            file.write(name_of(query) + "\n")
        flags_and_counts = struct.pack(">HHHHH", _NO_SUCH_NAME, 1, 0, 0, 0)
        server.sendto(query[:2] + flags_and_counts + query[_HEADER_BYTES:], client)


def main() -> int:
    notes, command = Path(sys.argv[1]), sys.argv[2:]
    start_loopback()
    with tempfile.NamedTemporaryFile("w", suffix=".resolv.conf") as resolver:
        resolver.write("nameserver 127.0.0.1\noptions attempts:1 timeout:1\n")
        resolver.flush()
        subprocess.run(["mount", "--bind", resolver.name, "/etc/resolv.conf"], check=True)
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 53))
        threading.Thread(target=note_queries, args=(server, notes), daemon=True).start()
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
