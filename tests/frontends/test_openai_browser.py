"""The page of serve.py in a real browser without a screen, with the small trained model."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FP32, Workshop
from tests.support.browser import chromium
from tests.support.command import ROOT
from tests.support.http_server import Served, serving

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="requirements/serving.txt is not installed")

TRAINED = ROOT / "models" / "nvlm-d-tiny"
NUMBER = ROOT / "examples" / "scan_1642.png"
WORD = ROOT / "examples" / "scan_petition.png"
NUM_TILES = 3  # of NUMBER, whose grid is 2 x 1
KEY = "a-key-that-nobody-guesses"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
BOXED = "<ref>1642</ref><box>(100, 200), (600, 700)</box>"
MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def engine(workshop: Workshop) -> Path:
    checkpoint = workshop.checkpoint("served_checkpoint", TRAINED, FP32)
    return workshop.engine("served_engine", checkpoint, vision="torch", max_num_images=2)


@pytest.fixture(scope="module")
def served(
    browser: Any, engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """browser: without one, no server is started."""
    with serving(engine, tmp_path_factory.mktemp("page")) as served:
        yield served


class Looked:
    """The page, opened. What the browser complains of and requests to elsewhere are collected."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self._heard(message))
        page.on("request", lambda request: self._asked(request.url, url))
        page.goto(url)

    def _heard(self, message: Any) -> None:
        if "the server responded with a status of" not in message.text:  # refusals are tested
            self.complaints.append(message.text)

    def _asked(self, address: str, url: str) -> None:
        if not address.startswith((f"{url}/", "data:")):
            self.complaints.append(address)

    def drop(self, *paths: Path, event: str = "drop") -> None:
        files = [[each.name, base64.b64encode(each.read_bytes()).decode()] for each in paths]
        self.page.evaluate(
            """([files, kind]) => {
              const transfer = new DataTransfer();
              for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
                const type = name.endsWith(".png") ? "image/png" : "";
                transfer.items.add(new File([bytes], name, { type }));
              }
              const made = kind === "paste"
                ? new ClipboardEvent(kind, { clipboardData: transfer, bubbles: true })
                : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
              document.body.dispatchEvent(made);
            }""",
            [files, event],
        )

    def until(self, condition: str) -> None:
        """As a function: the page's policy lets nobody evaluate a string again and again."""
        self.page.wait_for_function(f"() => {condition}")

    def wait_for_tiles(self, count: int) -> None:
        self.page.wait_for_function(
            "count => document.querySelectorAll('.tile img').length === count", arg=count
        )

    def ask(self, question: str) -> str:
        """The answer, once it is whole."""
        before = self.page.locator(".answer .timings:not(:empty)").count()
        self.page.locator("#question").fill(question)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            "n => document.querySelectorAll('.answer .timings:not(:empty)').length > n",
            arg=before,
        )
        self.until("document.getElementById('ask').textContent === 'Ask'")
        return str(self.page.locator(".answer .said").last.inner_text())

    def trouble(self) -> str:
        self.until("document.getElementById('trouble').textContent !== ''")
        return str(self.page.locator("#trouble").inner_text())

    def answer_always(self, text: str) -> None:
        """Holds the server to this answer: the small model draws no boxes and writes no HTML."""

        def held(route: Any) -> None:
            body = {**route.request.post_data_json, "structured_outputs": {"choice": [text]}}
            route.continue_(post_data=json.dumps(body))

        self.page.route("**/v1/chat/completions", held)


Look = Callable[..., Looked]


@pytest.fixture
def look(browser: Any) -> Iterator[Look]:
    """Opens a server's page; whatever the browser complained of fails the test in the end."""
    opened: list[tuple[Any, Looked]] = []

    def opening(served: Served, viewport: dict[str, int] = DESKTOP) -> Looked:
        context = browser.new_context(viewport=viewport)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        looked = Looked(context.new_page(), served.url)
        opened.append((context, looked))
        return looked

    yield opening
    for context, looked in opened:
        context.close()
        assert looked.complaints == []


def url_of(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def said(served: Served, messages: list[Any], **fields: Any) -> str:
    answer = served.ask(messages=messages, max_tokens=50, **fields)
    return str(answer["choices"][0]["message"]["content"])


def user(path: Path | None, question: str) -> dict[str, Any]:
    text = {"type": "text", "text": question}
    if path is None:
        return {"role": "user", "content": question}
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url_of(path)}}, text],
    }


def test_a_picture_is_dropped_and_its_number_streams_in(served: Served, look: Look) -> None:
    looked = look(served)
    page = looked.page
    looked.until("document.getElementById('model').textContent.startsWith('nvlm-d')")
    looked.drop(NUMBER)
    looked.wait_for_tiles(NUM_TILES)
    tags = page.locator(".tile figcaption").all_inner_texts()
    assert tags == ["<tile_1>", "<tile_2>", "<tile_global_thumbnail>"]
    widths = page.locator(".tile img").evaluate_all("all => all.map(each => each.naturalWidth)")
    assert widths == [224] * NUM_TILES
    page.evaluate(
        """() => {
          window.pieces = [];
          new MutationObserver(() => {
            const said = document.querySelector(".answer .said");
            if (said && said.textContent !== window.pieces.at(-1)) pieces.push(said.textContent);
          }).observe(document.getElementById("turns"), { subtree: true, childList: true });
        }"""
    )
    assert looked.ask("Read the number.") == "1642"
    pieces = [each for each in page.evaluate("pieces") if each]
    assert len(pieces) > 1, "it comes in pieces"
    assert all("1642".startswith(each) for each in pieces)
    printed = page.locator(".answer .timings").inner_text()
    for name in ("tiling ", "vision ", "first token ", " tokens/s", " tokens in", " out"):
        assert name in printed


def test_a_second_turn_shows_a_second_picture(served: Served, look: Look) -> None:
    looked = look(served)
    looked.drop(NUMBER, event="paste")
    looked.wait_for_tiles(NUM_TILES)
    assert looked.ask("Read the number.") == "1642"
    looked.drop(WORD)
    looked.until("document.querySelectorAll('#attached .tile').length > 0")
    answer = looked.ask("Read the word.")
    turns = [user(NUMBER, "Read the number."), {"role": "assistant", "content": "1642"}]
    assert answer == said(served, [*turns, user(WORD, "Read the word.")])
    assert looked.page.locator(".turn").count() == 4
    assert looked.page.locator("#attached .picture").count() == 0
    looked.page.locator("#anew").click()
    assert looked.page.locator(".turn").count() == 0


def test_a_box_of_the_answer_is_drawn_on_the_picture(served: Served, look: Look) -> None:
    looked = look(served)
    looked.answer_always(BOXED)
    looked.drop(NUMBER)
    looked.wait_for_tiles(NUM_TILES)
    assert looked.ask("Where is the number?") == BOXED
    frame = looked.page.locator(".turn .shown")
    image = frame.locator("img").bounding_box()
    box = frame.locator("rect").bounding_box()
    stroke = 3
    for side, at, whole in (("x", 0.1, "width"), ("y", 0.2, "height")):
        assert box[side] == pytest.approx(image[side] + at * image[whole], abs=stroke)
        assert box[whole] == pytest.approx(0.5 * image[whole], abs=2 * stroke)
    assert frame.locator("span").inner_text() == "1642"


def test_an_answer_with_markup_is_shown_as_it_is(served: Served, look: Look) -> None:
    looked = look(served)
    looked.answer_always(MARKUP)
    assert looked.ask("Hello") == MARKUP
    assert looked.page.locator(".answer b, .answer img").count() == 0


def test_a_mistake_is_reported_as_a_sentence_and_can_be_corrected(
    served: Served, look: Look
) -> None:
    looked = look(served)
    looked.drop(ROOT / "README.md")
    assert "expected a JPEG, PNG or other picture file" in looked.trouble()
    assert looked.trouble().endswith(".")
    assert looked.page.locator("#attached .picture").count() == 0
    looked.drop(NUMBER, NUMBER, NUMBER)
    looked.wait_for_tiles(3 * NUM_TILES)
    looked.page.locator("#question").fill("Read the number.")
    looked.page.keyboard.press("Enter")
    assert looked.trouble().startswith("The request has 3 images, the engine takes 2; ")
    assert looked.page.locator("#question").input_value() == "Read the number."
    for _ in range(2):
        looked.page.get_by_role("button", name="Remove").first.click()
    assert looked.ask("Read the number.") == "1642"
    assert looked.page.locator("#trouble").inner_text() == ""


def test_a_server_that_is_gone_is_reported_as_a_sentence(served: Served, look: Look) -> None:
    looked = look(served)
    looked.page.route("**/v1/chat/completions", lambda route: route.abort())
    looked.page.locator("#question").fill("Hello")
    looked.page.keyboard.press("Enter")
    assert looked.trouble().startswith("The server cannot be reached.")
    looked.complaints[:] = [each for each in looked.complaints if "ERR_FAILED" not in each]


def test_fewer_tiles_are_shown_and_asked_for(served: Served, look: Look) -> None:
    looked = look(served)
    looked.drop(NUMBER)
    looked.wait_for_tiles(NUM_TILES)
    looked.page.locator("#most_tiles").focus()
    for _ in range(5):
        looked.page.keyboard.press("ArrowLeft")
    looked.wait_for_tiles(1)
    answer = looked.ask("Read the number.")
    kwargs = {"max_num_tiles": 1}
    asked = [user(NUMBER, "Read the number.")]
    assert answer == said(served, asked, mm_processor_kwargs=kwargs)
    whole = served.ask(messages=asked, mm_processor_kwargs=kwargs)
    assert (
        f"{whole['usage']['prompt_tokens']} tokens in"
        in looked.page.locator(".timings").inner_text()
    )


def test_what_is_copied_asks_the_same_question(served: Served, look: Look, tmp_path: Path) -> None:
    looked = look(served)
    looked.drop(NUMBER)
    looked.wait_for_tiles(NUM_TILES)
    looked.page.locator("#question").fill("Read the number, it isn't \\n hard.")
    looked.until("document.getElementById('most_tiles').max === '6'")
    copied = {}
    for kind in ("curl", "python"):
        looked.page.evaluate("navigator.clipboard.writeText('')")
        looked.page.locator(f"#copy_{kind}").click()
        looked.page.wait_for_function("async () => (await navigator.clipboard.readText()) !== ''")
        copied[kind] = tmp_path / kind
        copied[kind].write_text(looked.page.evaluate("navigator.clipboard.readText()"))
    expected = said(served, [user(NUMBER, "Read the number, it isn't \\n hard.")])
    run: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    printed = subprocess.run(["/bin/sh", copied["curl"]], **run).stdout
    assert json.loads(printed)["choices"][0]["message"]["content"] == expected
    pytest.importorskip("openai", reason="requirements/test.txt is not installed")
    assert subprocess.run([sys.executable, copied["python"]], **run).stdout.strip() == expected


def test_the_page_works_from_the_keyboard(served: Served, look: Look) -> None:
    looked = look(served)
    page = looked.page
    page.on("filechooser", lambda _: None)  # from now on no dialog of the system opens
    looked.until("document.activeElement.id === 'question'")
    seen = []
    for _ in range(6):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    assert seen == [
        *("choose", "most_tiles", "temperature", "copy_curl", "copy_python", "ask"),
    ]
    page.locator("#choose").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(NUMBER)
    looked.wait_for_tiles(NUM_TILES)
    page.locator("#question").focus()
    page.keyboard.type("Read the number.")
    page.keyboard.press("Shift+Enter")
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    looked.until("document.querySelector('.answer .said')?.textContent === '1642'")


def test_escape_stops_an_answer_and_keeps_what_was_said(served: Served, look: Look) -> None:
    looked = look(served)
    looked.answer_always("0123456789" * 40)
    looked.page.locator("#question").fill("Hello")
    looked.page.keyboard.press("Enter")
    looked.until("document.querySelector('.answer .said')?.textContent.length > 3")
    looked.page.keyboard.press("Escape")
    looked.until("document.getElementById('status').textContent === 'Stopped.'")
    served.wait_for_sample("nvlm_num_requests_running", 0)
    assert 0 < len(looked.page.locator(".answer .said").inner_text()) < 400


def test_nothing_is_wider_than_a_phone(served: Served, look: Look) -> None:
    looked = look(served, PHONE)
    looked.answer_always(BOXED * 3)
    looked.drop(NUMBER)
    looked.wait_for_tiles(NUM_TILES)
    wide = "document.documentElement.scrollWidth"
    assert looked.page.evaluate(wide) == PHONE["width"]
    looked.ask("W" * 200)
    assert looked.page.evaluate(wide) == PHONE["width"]
    looked.drop(NUMBER)
    looked.until("document.querySelectorAll('#attached .tile').length > 0")
    for name in ("#ask", "#choose", "#copy_python", "#question"):
        box = looked.page.locator(name).bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= PHONE["width"], name
        assert 0 <= box["y"] < box["y"] + box["height"] <= PHONE["height"], name


def test_a_key_is_asked_for_and_kept_in_memory_alone(
    browser: Any, engine: Path, look: Look, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    with serving(engine, tmp_path, "--api_key_file", file) as locked:
        looked = look(locked)
        page = looked.page
        assert looked.trouble().startswith("The API key is missing or wrong")
        page.locator("#key").fill("another")
        page.keyboard.press("Enter")
        looked.until("document.getElementById('key').value === ''")
        assert page.locator("#key").is_visible()
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        looked.until("document.getElementById('key_row').hidden")
        looked.drop(NUMBER)
        looked.wait_for_tiles(NUM_TILES)
        assert looked.ask("Read the number.") == "1642"
        page.locator("#copy_curl").click()
        page.wait_for_function(
            "async () => (await navigator.clipboard.readText()).startsWith('curl')"
        )
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "Bearer $NVLM_API_KEY" in copied
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert page.evaluate(kept) == '[{},{},""]'
        assert KEY not in copied + page.content()
        page.reload()
        looked.until("!document.getElementById('key_row').hidden")
