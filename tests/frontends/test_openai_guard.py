"""Who may ask, how much, in which form, and what the log says of it."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.program.errors import UserError
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from tests.support.asgi import Client, Reply
from tests.support.command import one_line_error, run_command

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions
from frontends.openai.guard import (
    Guard,
    host_names,
    is_loopback,
    origin_names,
    own_names,
    read_keys,
)

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "A secret question"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def door(float32_engine_dir: Path) -> Iterator[Door]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        server = Server(runner)
        door = Door(DoorOptions(max_body_bytes=5000))
        door.open(server)
        yield door
        server.close()
        door.close()


def ask(
    door: Door, guard: Guard, body: Any = BODY, host: str = "localhost", **headers: str
) -> Reply:
    with Client(application(door, guard), host) as client:
        return client.post(CHAT, body, **headers)


def test_keys_are_asked_for_but_by_probes(door: Door, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# whose\nfirst-key\n\nsecond-key\n")
    guard = Guard(read_keys(file))
    for key in ("first-key", "second-key"):
        assert ask(door, guard, authorization=f"Bearer {key}").status == 200
    for given in (
        {},
        {"authorization": "Bearer other"},
        {"authorization": "first-key"},
        {"authorization": "Bearer # whose"},
        {"authorization": "Bearer "},
    ):
        reply = ask(door, guard, **given)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert "first-key" not in reply.body.decode()
    with Client(application(door, guard)) as client:
        for path in ("/health", "/metrics", "/ping", "/version"):
            assert client.get(path).status == 200
        assert client.get("/v1/models").status == 401
        assert client.post("/tokenize", {"prompt": "x"}).status == 401


def test_a_key_may_have_any_letters(door: Door, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("schlüssel\n", "utf-8")
    guard = Guard(read_keys(tmp_path / "keys"))
    as_sent = "schlüssel".encode().decode("latin-1")
    assert ask(door, guard, authorization=f"Bearer {as_sent}").status == 200
    assert ask(door, guard, authorization="Bearer schl?ssel").status == 401


def test_a_file_of_keys_holds_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")
    (tmp_path / "empty").write_text("\n# none\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(tmp_path / "empty")


def test_a_comment_may_be_indented_and_an_editor_may_mark_its_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\n  # not a key\n")
    (tmp_path / "marked").write_text("first\n", "utf-8-sig")
    assert read_keys(tmp_path / "keys") == read_keys(tmp_path / "marked")


def test_keys_that_others_can_read_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    file.chmod(0o600)
    read_keys(file)
    assert not caplog.records
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in caplog.text
    assert "first" not in caplog.text


@pytest.mark.parametrize("name", ["", "https://a.example", "a.example:8000", "*", "a/b"])
def test_a_host_that_no_client_names_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no host name"):
        host_names([name])
    assert host_names(["Chat.example", "::1"]) == {"chat.example", "::1"}


@pytest.mark.parametrize("origin", ["", "*", "chat.example", "https://", "https://a.example/", "a"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(UserError, match="is no origin"):
        origin_names([origin])
    assert origin_names(["https://Chat.example:8443"]) == {"https://chat.example:8443"}


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000"])
def test_this_machines_names_are_served(door: Door, host: str) -> None:
    assert ask(door, Guard(hosts=own_names()), host=host).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "", "[::1", "::"])
def test_a_name_that_was_rebound_is_refused(door: Door, host: str) -> None:
    reply = ask(door, Guard(hosts=own_names()), host=host)
    assert (reply.status, reply.error["code"]) == (403, "host_not_allowed")


def test_any_address_of_the_loopback_is_this_machine(door: Door) -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.0.0.2", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1")))
    guard = Guard(hosts=own_names("127.0.0.2"))
    assert ask(door, guard, host="127.0.0.2:8000").status == 200
    assert ask(door, guard, host="evil.example").status == 403


def test_pages_of_others_may_not_ask(door: Door) -> None:
    reply = ask(door, Guard(), origin="https://evil.example")
    assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in reply.headers
    assert ask(door, Guard(), origin="null").status == 403
    assert ask(door, Guard(), origin="http://[").error["code"] == "origin_not_allowed"
    assert ask(door, Guard(), host="here:1", origin="http://here:1").status == 200


def test_named_pages_may_ask_from_a_browser(door: Door) -> None:
    guard = Guard(origins=frozenset({"https://chat.example"}))
    reply = ask(door, guard, origin="https://chat.example")
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://chat.example"
    with Client(application(door, guard)) as client:
        headers = {"origin": "https://chat.example", "access_control_request_method": "POST"}
        headers["access_control_request_headers"] = "authorization,x-stainless-os"
        reply = client.begin("OPTIONS", CHAT, b"", headers).wait()
        assert reply.status == 204
        assert reply.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        headers["origin"] = "https://evil.example"
        assert client.begin("OPTIONS", CHAT, b"", headers).wait().status == 403


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_json_is_named_as_such(door: Door, kind: str) -> None:
    """A form of another page can send text/plain to this machine without asking."""
    assert ask(door, Guard(), content_type=kind).status == 415


def test_a_body_is_limited(door: Door) -> None:
    assert ask(door, Guard(), b"[" + b" " * 5000 + b"]").status == 413
    assert ask(door, Guard(), BODY, content_length="5001").status == 413
    assert ask(door, Guard(), BODY, content_encoding="gzip").status == 415


def test_the_log_has_neither_text_nor_pictures(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("frontends.openai.access")
    picture = "data:image/png;base64,c2VjcmV0IHBpY3R1cmU="
    wrong = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}
        ],
        "temperature": "secret",
    }
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger.name):
        first = ask(door, Guard(), {**BODY, "request_id": "mine"})
        second = ask(door, Guard(), wrong, x_request_id="theirs\n" + "x" * 500)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == logger.name]
    assert [line["status"] for line in lines] == [200, 400]
    assert [line["request_id"] for line in lines] == [
        reply.headers["x-request-id"] for reply in (first, second)
    ]
    assert first.json()["id"] == f"chatcmpl-{lines[0]['request_id']}"
    assert lines[0]["client_request_id"] == "mine"
    assert len(lines[1]["client_request_id"]) <= 128
    assert lines[1]["error"] == "temperature"
    assert "secret" not in caplog.text
    assert "c2Vj" not in caplog.text


def test_a_server_that_cannot_start_says_why(float32_engine_dir: Path, tmp_path: Path) -> None:
    flags = ("--engine_dir", float32_engine_dir, "--device", "cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_line_error(run_command("serve", *flags, "--port", port), f"port {port}", "--port")
    none = tmp_path / "none"
    one_line_error(run_command("serve", *flags, "--api_key_file", none), "cannot be read")
    one_line_error(run_command("serve", "--engine_dir", none, "--port", 0), str(none))
    one_line_error(run_command("serve", *flags, "--port", 99999), "--port is '99999'", "65535")
    one_line_error(run_command("serve", *flags, "--model_name", ""), "--model_name has an empty")
    one_line_error(run_command("serve", *flags, "--allowed_host", "a:1"), "--allowed_host a:1")
    one_line_error(run_command("serve", *flags, "--allowed_origin", "*"), "--allowed_origin *")
