"""Fetches pictures from the web, only from hosts that the operator named.

A host's addresses are checked after they are resolved, and the connection goes to the checked
address: a name that points into the operator's own network is refused, also when it is resolved
anew in between. Blocking: app.py calls it in threads.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from nvlm.program.errors import UserError, cut

_REDIRECTS = {301, 302, 303, 307, 308}
_PORTS = {"http": 80, "https": 443}


_HOLDING_IPV4 = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")))
"""NAT64 and 6to4: an IPv4 address stands in an IPv6 one, and may be anybody's."""


def is_public(address: str) -> bool:
    """Whether an address belongs to nobody's own network, and to no machine's own services."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    is_holding_ipv4 = any(ip in network for network in _HOLDING_IPV4)
    return ip.is_global and not ip.is_multicast and not is_holding_ipv4


def domains_of(names: Iterable[str]) -> frozenset[str]:
    """Names as a flag gives them: host or host:port. Raises `UserError` for another form."""
    for name in names:
        if not name or not name.isascii() or any(each in name for each in "/*@ "):
            raise UserError(
                f"--allowed_media_domain {name} is no host name, expected one such as "
                "images.example.com, without https:// and without *"
            )
    return frozenset(name.lower().rstrip(".") for name in names)


@dataclass(frozen=True, slots=True)
class MediaRules:
    """Which pictures a server fetches."""

    # Hosts by their exact names, with a port where it is not the scheme's.
    domains: frozenset[str] = frozenset()
    max_bytes: int = 32 << 20  # of one picture
    timeout_s: float = 10.0  # of all, redirects included
    max_redirects: int = 3  # of one picture
    # Whether an address may be asked; by default only public ones.
    is_allowed: Callable[[str], bool] = field(default=is_public)

    def fetch(self, url: str) -> bytes:
        """The file at `url`. Raises `UserError` for what may not be fetched or does not come."""
        deadline = time.monotonic() + self.timeout_s
        for _ in range(self.max_redirects + 1):
            parts = self._split(url)
            try:
                answer = self._get(parts, deadline)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise UserError(
                    f"the picture cannot be fetched from {parts.netloc} ({type(error).__name__}); "
                    "send it as a data: URL"
                ) from None
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise UserError(f"the picture's address redirects more than {self.max_redirects} times")

    def _split(self, url: str) -> SplitResult:
        """Raises `UserError` unless the operator allows the address's host."""
        if not self.domains:
            raise UserError(
                "a picture is an http(s) address, and this server fetches nothing (its operator "
                "gives --allowed_media_domain); send a data: URL"
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise UserError("the picture's address cannot be read; send a data: URL") from None
        if parts.scheme not in _PORTS or parts.username is not None or not parts.hostname:
            raise UserError(f"the picture's address {cut(url)} is not plain http(s)://host/path")
        if not url.isascii() or any(ord(character) <= 32 for character in url):
            raise UserError("the picture's address has a character that must be written as %XX")
        host = parts.hostname.rstrip(".").lower()
        has_own_port = port is not None and port != _PORTS[parts.scheme]
        if (f"{host}:{port}" if has_own_port else host) not in self.domains:
            raise UserError(
                f"pictures of {cut(parts.netloc)} are not fetched here (an operator "
                "gives --allowed_media_domain); send a data: URL"
            )
        return parts

    def _get(self, parts: SplitResult, deadline: float) -> bytes | str:
        """The file, or where it is to be found."""
        host = parts.hostname
        assert host is not None
        sock = self._connect(parts, host.rstrip("."), deadline)
        connection = http.client.HTTPConnection(host)
        connection.sock = sock
        # Each read has a timeout of its own; a host that sends byte by byte has this one.
        end = threading.Timer(_left(deadline), _shut, [sock])
        end.start()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            answer = self._ask(connection, parts)
        finally:
            end.cancel()
            connection.close()
        _left(deadline)  # what ended by the timer is not whole
        return answer

    def _ask(self, connection: http.client.HTTPConnection, parts: SplitResult) -> bytes | str:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "User-Agent": "nvlm-engine", "Accept": "image/*,*/*"}
        connection.request("GET", target, headers={**headers, "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and (place := response.getheader("Location")):
            return place
        if response.status != 200:
            raise UserError(
                f"{parts.netloc} answers {response.status} for the picture; check its address"
            )
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise UserError(f"{parts.netloc} sends the picture compressed; send a data: URL")
        return self._read(response)

    def _connect(self, parts: SplitResult, host: str, deadline: float) -> socket.socket:
        port = parts.port or _PORTS[parts.scheme]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if not all(map(self.is_allowed, addresses)):
            raise UserError(f"{host} is an address of a private network, which is not fetched from")
        plain = socket.create_connection((addresses[0], port), timeout=_left(deadline))
        if parts.scheme == "http":
            return plain
        context = ssl.create_default_context()
        try:
            return context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
        except BaseException:
            plain.close()
            raise

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        data = response.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise UserError(
                f"the picture at that address has more than {self.max_bytes:,} bytes, which is "
                "this server's limit"
            )
        if response.length:  # what was announced and did not come
            raise UserError("the picture came only in part; try again, or send a data: URL")
        return data


def _shut(sock: socket.socket) -> None:
    """Ends a read that waits in another thread, of TLS too."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
