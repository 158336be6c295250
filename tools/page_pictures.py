"""Takes the pictures of the server's page that the documents show, in a Chromium without a screen.

    python -m tools.page_pictures --url http://127.0.0.1:8000 [--output_dir docs/pictures]

`make serve` serves the small trained model there. It knows no objects: for the picture with the
box its answer is held to one text (structured_outputs), which the page then shows as any other.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from nvlm.program.command_line import ArgumentParser, run
from tools.tiny.evaluation import draw_sample

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

COFFEE = Path("examples/coffee.jpg")
BOXED = "<ref>the cup</ref><box>(285, 35), (695, 745)</box>"
DESKTOP, TALL, PHONE = (1000, 880), (1000, 960), (360, 740)
SEED = 26


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", required=True, help="of a server with the small trained model")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        browser = p.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, size, take in (
            ("page_turns.png", DESKTOP, _turns),
            ("page_box.png", TALL, _box),
            ("page_phone.png", PHONE, _phone),
        ):
            page = _open(browser, arguments.url, size)
            take(page, Path(folder))
            _save(page.screenshot(), arguments.output_dir / name)
            page.close()
        browser.close()


def _save(screenshot: bytes, path: Path) -> None:
    """Saves in 256 colours: a photo takes a quarter of the bytes."""
    with Image.open(io.BytesIO(screenshot)) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def _turns(page: Page, folder: Path) -> None:
    """A number, a second picture, and a question about it."""
    for task in ("number", "which_tile"):
        sample = draw_sample(task, 0, random.Random(f"{SEED}-{task}"))
        assert sample.image is not None
        sample.image.save(folder / f"{task}.png")
        _show(page, folder / f"{task}.png")
        _ask(page, sample.question)


def _box(page: Page, folder: Path) -> None:
    def held(route: Any) -> None:
        body = {**route.request.post_data_json, "structured_outputs": {"choice": [BOXED]}}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", held)
    _show(page, COFFEE)
    _ask(page, "Where is the cup?")


def _phone(page: Page, folder: Path) -> None:
    """An answer, and a mistake."""
    _show(page, Path("examples/scan_1642.png"))
    _ask(page, "Read the number.")
    page.locator("#files").set_input_files("README.md")
    page.wait_for_function("() => document.getElementById('trouble').textContent !== ''")


def _open(browser: Browser, url: str, size: tuple[int, int]) -> Page:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(url)
    page.wait_for_function("() => document.getElementById('most_tiles').value === '6'")
    return page


def _show(page: Page, path: Path) -> None:
    page.locator("#files").set_input_files(path)
    page.wait_for_function("() => document.querySelectorAll('#attached .tile').length > 0")


def _ask(page: Page, question: str) -> None:
    num = page.locator(".timings:not(:empty)").count()
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    has_timings = "num => document.querySelectorAll('.timings:not(:empty)').length > num"
    page.wait_for_function(has_timings, arg=num)
    page.wait_for_function("() => document.getElementById('ask').textContent === 'Ask'")


if __name__ == "__main__":
    run(main)
