"""Who may ask: API keys, and the Host and Origin that a browser sends.

A web page that somebody visits can make his browser send requests to his own machine. Host is
checked against names that are rebound to it, Origin against pages of others.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from frontends.openai.errors import ApiError
from nvlm.program.errors import UserError, shown

logger = logging.getLogger(__name__)


OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})
"""Probes and Prometheus need no key, and name a machine by its address."""

_KEYLESS_PATHS = frozenset({"/"})
"""The page asks for a key itself, and is the same for everybody."""

_OWN_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether no other machine reaches a server that listens on `host`, a name or an address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False  # whoever listens on it says so
    return all(ip_address(address[0]).is_loopback for *_, address in found)


def own_names(host: str = "localhost") -> frozenset[str]:
    """What a client on this machine calls it where the server listens on `host`."""
    return _OWN_NAMES | {host.lower()}


@dataclass(frozen=True, slots=True)
class Guard:
    """Who may ask."""

    key_digests: tuple[bytes, ...] = ()  # SHA-256 of the keys; empty: none is needed
    hosts: frozenset[str] | None = None  # names in Host that are served; None: any
    origins: frozenset[str] = frozenset()  # of other pages that may ask

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises `ApiError` for a request that is not served."""
        if path in OPEN_PATHS:
            return
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(
                403,
                f"the Host header is {shown(host)}, expected one of "
                f"{', '.join(sorted(self.hosts))}; the operator names others by --allowed_host",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self.is_allowed_origin(origin, host):
            raise ApiError(
                403,
                f"pages of the Origin {shown(origin)} may not ask; the operator "
                "names them by --allowed_origin",
                code="origin_not_allowed",
            )
        if path not in _KEYLESS_PATHS:
            self._check_key(headers.get("authorization", ""))

    def is_allowed_origin(self, origin: str, host: str) -> bool:
        """Whether a page may ask: the server's own, or one that the operator named."""
        return origin in self.origins or _authority(origin) == host.lower() != ""

    def _check_key(self, authorization: str) -> None:
        if not self.key_digests:
            return
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip().encode("latin-1"))  # the bytes that were sent
        # Every key is compared, and each in the same time.
        matches = [hmac.compare_digest(digest, each) for each in self.key_digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def host_names(names: Iterable[str]) -> frozenset[str]:
    """What --allowed_host gives, as `Guard` has it. Raises `UserError` for another form."""
    for name in names:
        address = f"[{name}]" if name.count(":") > 1 else name  # IPv6
        if not name or "*" in name or _name(address) != name.lower():
            raise UserError(
                f"--allowed_host {name} is no host name, expected one such as chat.example.com, "
                "without https:// and without a port"
            )
    return frozenset(name.lower() for name in names)


def origin_names(origins: Iterable[str]) -> frozenset[str]:
    """What --allowed_origin gives. Raises `UserError` for what no browser sends as an Origin."""
    for origin in origins:
        scheme, mark, host = origin.partition("://")
        if not (scheme.isalpha() and mark and host) or any(each in host for each in "/*@? "):
            raise UserError(
                f"--allowed_origin {origin} is no origin, expected one such as "
                "https://chat.example.com, without a path and without *"
            )
    return frozenset(origin.lower() for origin in origins)


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The digests of the keys in a file, one a line; empty lines and lines with # are none."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--api_key_file {path} cannot be read ({error}); give a file with one key a line"
        ) from None
    lines = [line.strip() for line in lines]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api_key_file {path} holds no key; write one a line")
    if path.stat().st_mode & 0o077:
        logger.warning(
            "--api_key_file %s can be read by others on this machine; chmod 600 it", path
        )
    return tuple(_digest(key.encode()) for key in keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _authority(origin: str) -> str:
    """Host and port of an Origin header; empty for what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
