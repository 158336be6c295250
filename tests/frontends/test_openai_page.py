"""The page at / without a browser: what is sent, under which rules, and the tiles it shows."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.inputs.prompt import tile_tags
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket
from tests.support.asgi import Client
from tests.support.asking import Images

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions
from frontends.openai.guard import Guard, own_names
from frontends.openai.page.document import SCRIPTS

PAGE = Path(__file__).parents[2] / "frontends" / "openai" / "page"


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        yield runner


@pytest.fixture
def client(runner: Runner) -> Iterator[Client]:
    server = Server(runner)
    door = Door(DoorOptions())
    door.open(server)
    with Client(application(door)) as client:
        yield client
    server.close()
    door.close()


def policy(client: Client) -> dict[str, list[str]]:
    header = client.get("/").headers["content-security-policy"]
    rules = (rule.split() for rule in header.split("; "))
    return {name: sources for name, *sources in rules}


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else(client: Client) -> None:
    text = client.get("/").body.decode()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert policy(client) == {
        "default-src": ["'none'"],
        "script-src": [hash_of(script)],
        "style-src": [hash_of(style)],
        "img-src": ["data:"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
    }
    assert client.get("/").headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["content-type"].startswith("text/html")


def test_the_page_refers_to_no_other_place(client: Client) -> None:
    text = client.get("/").body.decode()
    assert set(re.findall(r"\w+://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(?:src|href|action)=["']?(?!data:)\w""", text)
    assert not re.search(r"@import|\burl\(", text)


def test_every_script_of_the_folder_stands_in_the_page(client: Client) -> None:
    assert sorted(SCRIPTS) == sorted(path.name for path in PAGE.glob("*.js"))
    text = client.get("/").body.decode()
    assert all(path.read_text() in text for path in (*PAGE.glob("*.js"), PAGE / "page.css"))


def test_no_script_makes_html_of_text_or_keeps_anything() -> None:
    text = "".join(path.read_text() for path in PAGE.glob("*.js"))
    for word in (
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("),
        *("localStorage", "sessionStorage", "indexedDB", "document.cookie"),
    ):
        assert word not in text, word


def test_the_page_needs_no_key_and_its_questions_do() -> None:
    """It asks for the key itself. A name that was rebound gets no page."""
    guard = Guard((hashlib.sha256(b"key").digest(),), own_names())
    door = Door(DoorOptions())
    with Client(application(door, guard)) as client:
        assert client.get("/").status == 200
        assert client.get("/v1/models").status == 401
        assert client.post("/v1/tiles", {"messages": []}).status == 401
    with Client(application(door, guard), "evil.example") as client:
        assert client.get("/").status == 403
    door.close()


def part(path: Path, **more: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **more}}


def asked(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **fields}


def pixels(url: str) -> np.ndarray:
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("most", [None, 1, 3])
def test_the_tiles_are_the_pixels_that_the_vision_encoder_gets(
    client: Client, runner: Runner, images: Images, most: int | None
) -> None:
    paths = [images("landscape_800x450.png"), images("portrait_400x1000.png")]
    settings = {} if most is None else {"max_num_tiles": most}
    ticket = Ticket(GenerationRequest.images_first("", tuple(paths), **settings))
    runner.prepare(ticket)
    body = client.post("/v1/tiles", asked(*map(part, paths), mm_processor_kwargs=settings)).json()
    assert body["tokens_per_tile"] == runner.engine.vision_config.tokens_per_tile
    for shown, image in zip(body["pictures"], ticket.images, strict=True):
        assert shown["grid"] == list(image.grid)
        assert [tile["tag"] for tile in shown["tiles"]] == tile_tags(image.num_tiles)
        for tile, expected in zip(shown["tiles"], image.tiles, strict=True):
            assert (pixels(tile["url"]) == expected).all()


def test_a_picture_of_low_detail_is_its_thumbnail(client: Client, images: Images) -> None:
    path = images("landscape_800x450.png")
    (shown,) = client.post("/v1/tiles", asked(part(path, detail="low"))).json()["pictures"]
    assert [tile["tag"] for tile in shown["tiles"]] == ["<tile_global_thumbnail>"]


def test_tiles_of_what_is_no_question_are_refused_as_a_question_is(client: Client) -> None:
    for body, param in (
        ({}, "messages"),
        (
            asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}),
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "model": "other"}, "model"),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "mm_processor_kwargs": {"max_num_tiles": 0},
            },
            "mm_processor_kwargs.max_num_tiles",
        ),
    ):
        assert client.post("/v1/tiles", body).error["param"] == param


def test_the_model_says_how_many_tiles_and_pictures_it_takes(
    client: Client, runner: Runner
) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["max_num_tiles"] == runner.engine.tiling.max_num_tiles
    assert card["max_num_images"] == runner.engine.limits.max_num_images


def test_timings_come_where_they_are_asked_for(client: Client, images: Images) -> None:
    body = asked(part(images("landscape_800x450.png")), max_tokens=4, return_timings=True)
    names = {
        *("queue_ms", "tiling_ms", "vision_ms", "prefill_ms", "decode_ms", "total_ms"),
        "decode_tokens_per_s",
    }
    whole = client.post("/v1/chat/completions", body).json()
    *chunks, last = client.post("/v1/chat/completions", {**body, "stream": True}).events()
    assert not any("timings" in chunk for chunk in chunks)
    assert (last["choices"], "usage" in last) == ([], False)
    for timings in (whole["timings"], last["timings"]):
        assert set(timings) == names
        parts = [timings[name] for name in names - {"total_ms", "decode_tokens_per_s"}]
        assert sum(parts) == pytest.approx(timings["total_ms"], abs=0.01)
        assert timings["tiling_ms"] > 0
    without = client.post("/v1/chat/completions", {**body, "return_timings": False}).json()
    assert "timings" not in without


def test_pictures_that_are_looked_at_are_read_one_after_the_other(
    runner: Runner, client: Client, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture may take hundreds of megabytes, and the page sends all that are dropped at once."""
    running, most, lock = 0, 0, threading.Lock()
    prepare = runner.prepare

    def watched(ticket: Ticket) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        prepare(ticket)
        with lock:
            running -= 1

    monkeypatch.setattr(runner, "prepare", watched)
    body = asked(part(images("landscape_800x450.png")))
    paths = ("/v1/tiles", "/tokenize") * 3
    calls = [client.begin_post(path, body) for path in paths]
    assert [call.wait().status for call in calls] == [200] * len(paths)
    assert most == 1
