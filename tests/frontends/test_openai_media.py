"""Pictures from the web: only named hosts, public addresses, in time and of a size."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from nvlm.program.errors import UserError
from tests.support.asking import Images

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")

from frontends.openai.requests import media
from frontends.openai.requests.media import MediaRules, domains_of, is_public


class Handler(http.server.BaseHTTPRequestHandler):
    file = b""

    def do_GET(self) -> None:
        match self.path:
            case "/picture.png?size=1":
                self._answer(200, self.file)
            case "/moved":
                self._answer(302, b"", Location="/picture.png?size=1")
            case "/loop":
                self._answer(302, b"", Location="/loop")
            case "/away":
                self._answer(302, b"", Location="http://evil.example/picture.png")
            case "/file":
                self._answer(302, b"", Location="file:///etc/passwd")
            case "/gone":
                self._answer(404, b"")
            case "/large":
                self._answer(200, b"x" * 100_000)
            case "/zipped":
                self._answer(200, b"x", Content_Encoding="gzip")
            case "/cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x")
            case "/slow":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(40):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)

    def _answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the fetcher has left
            self.close_connection = True


@pytest.fixture(scope="module")
def port(images: Images) -> Iterator[int]:
    Handler.file = images("pixel_1x1.png").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def rules(port: int) -> MediaRules:
    """The web of the tests is this machine."""
    return MediaRules(
        domains_of([f"localhost:{port}"]), 50_000, timeout_s=1.0, is_allowed=lambda _: True
    )


@pytest.mark.parametrize("path", ["picture.png?size=1", "moved"])
def test_a_picture_is_fetched_from_a_named_host(
    rules: MediaRules, port: int, path: str, images: Images
) -> None:
    found = rules.fetch(f"http://LOCALHOST:{port}/{path}")
    assert found == images("pixel_1x1.png").read_bytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("loop", "redirects more than 3 times"),
        ("away", "evil.example are not fetched"),
        ("file", "not plain http"),
        ("gone", "answers 404"),
        ("large", "more than 50,000 bytes"),
        ("zipped", "compressed"),
        ("cut", "only in part"),
        ("slow", "TimeoutError|only in part"),
    ],
)
def test_what_does_not_come_is_refused(
    rules: MediaRules, port: int, path: str, message: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=message):
        rules.fetch(f"http://localhost:{port}/{path}")
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/a.png",  # another port
        "http://sub.localhost:{port}/a.png",
        "http://localhost.evil.example:{port}/a.png",
        "http://evil.example#@localhost:{port}/a.png",
        "http://localhost:{port}@evil.example/a.png",
        "http://user@localhost:{port}/a.png",
        "http://localhost:{port}\\@evil.example/a.png",
        "http://127.0.0.1:{port}/a.png",
        "http://[::1]:{port}/a.png",
        "http://localhost:99999/a.png",
        "http:///a.png",
        "ftp://localhost:{port}/a.png",
        "http://localhost:{port}/a\r\nHost: evil.example",
    ],
)
def test_an_address_that_is_not_named_is_not_connected_to(
    rules: MediaRules, port: int, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any, **__: Any) -> socket.socket:
        raise AssertionError("it connected")

    monkeypatch.setattr(media.socket, "create_connection", connect)
    with pytest.raises(UserError):
        rules.fetch(url.replace("{port}", str(port)))


def test_a_named_host_with_a_private_address_is_not_connected_to(
    rules: MediaRules, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addresses are those of one resolution, and the connection goes to the checked one."""
    with pytest.raises(UserError, match="private network"):
        replace(rules, is_allowed=is_public).fetch(f"http://localhost:{port}/picture.png?size=1")
    connected: list[Any] = []

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in ("203.0.114.1", "10.0.0.1")]

    def connect(address: Any, **_: Any) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(media.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(media.socket, "create_connection", connect)
    public = replace(rules, is_allowed=is_public)
    with pytest.raises(UserError, match="private network"):
        public.fetch(f"http://localhost:{port}/picture.png?size=1")
    assert connected == [], "one private address is enough"
    with pytest.raises(UserError, match="cannot be fetched"):
        rules.fetch(f"http://localhost:{port}/picture.png?size=1")
    assert connected == [("203.0.114.1", port)]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_only_public_addresses_are_public(address: str, expected: bool) -> None:
    assert is_public(address) == expected


@pytest.mark.parametrize("name", ["https://a.example", "*.example.com", "", "a b", "a@b"])
def test_a_domain_is_a_host_name(name: str) -> None:
    with pytest.raises(UserError, match="no host name"):
        domains_of([name])


def test_nothing_is_fetched_unless_asked_for() -> None:
    with pytest.raises(UserError, match="fetches nothing"):
        MediaRules().fetch("https://example.com/a.png")
