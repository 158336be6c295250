"""The report in a real browser without a screen: what a person would see and click."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.benchmarks import ocrbench, text_vqa
from tests.support.browser import chromium
from tests.support.command import GENERATE, SCORE, run_command


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def answer_by_hand(prefix: Path, task: str, answers: dict[Any, str]) -> None:
    """Puts answers into the lines that run.py wrote."""
    path = Path(f"{prefix}-{task}-dprank=0-partition=0.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["answer"] = answers[line["sample_id"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, float32_engine_dir: Path) -> Path:
    """Two runs of two tasks; the answers are ours, so what must be seen is known."""
    folder = tmp_path_factory.mktemp("report")
    ours = {
        "OCRBench": {0: "30578", 1: "<b>Silver</b>", 2: "7"},
        "TextVQA": {34602: "4071", 34603: "garden"},
    }
    theirs = {
        "OCRBench": {0: "30578", 1: "copper", 2: "7"},
        "TextVQA": {34602: "4071", 34603: "garden"},
    }
    for made in (ocrbench(folder / "ocr"), text_vqa(folder / "text")):
        for name, answers in (("fp8", ours), ("bf16", theirs)):
            common = ("--engine_dir", float32_engine_dir, "--device", "cpu", "--max_new_tokens", 1)
            flags = (*common, *made.run_flags, "--output_path", folder / name)
            assert run_command(*GENERATE, *flags).exit_code == 0
            answer_by_hand(folder / name, made.task, answers[made.task])
    flags = ("--input_path", folder / "fp8", "--compare", folder / "bf16")
    result = run_command(*SCORE, *flags, "--report_dir", folder / "report")
    assert result.exit_code == 0, result.stderr
    return folder / "report" / "report.html"


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report, opened; complaints of the browser and requests to anywhere fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else complaints.append(request.url)
        ),
    )
    page.goto(report.as_uri())
    yield page
    page.close()
    assert complaints == []


def visible_cards(page: Any) -> list[str]:
    found: list[str] = page.locator("figure:visible header span").all_inner_texts()
    return found


def test_our_rows_stand_above_the_cards(page: Any) -> None:
    rows = page.locator("#card tbody tr")
    assert rows.count() == 8
    first = rows.nth(0).locator("th, td").all_inner_texts()
    assert first[0].startswith("fp8")
    assert first[3] == "2"  # OCRBench: 30578, and one of copper and Silver
    second = rows.nth(1).locator("th, td").all_inner_texts()
    assert second[0].startswith("bf16")
    assert rows.nth(2).locator("th").inner_text() == "NVLM-D 1.0 72B (Megatron-Core)"
    assert "851" in rows.nth(2).locator("td").all_inner_texts()


def test_every_sample_shows_its_image_tiles_question_and_verdict(page: Any) -> None:
    assert sorted(visible_cards(page)) == [
        *("OCRBench 0", "OCRBench 1", "OCRBench 2", "TextVQA 34602", "TextVQA 34603"),
    ]
    widths = page.locator("figure img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(widths) == 2 * 5
    assert min(widths) > 50, "an image that does not load is 0 wide"
    card = page.locator("figure", has_text="TextVQA 34603")
    assert card.locator("mark").inner_text() == "partly"
    assert card.locator("figcaption p").inner_text().startswith("Read the word.")
    assert card.locator("dd").all_inner_texts() == ["garden", "garden / the Garden / yard"]
    assert card.locator("small").inner_text() == "3 tiles"


def test_an_answer_with_markup_is_shown_as_it_is(page: Any) -> None:
    card = page.locator("figure", has_text="OCRBench 1")
    assert card.locator("dd").all_inner_texts() == ["<b>Silver</b>", "copper", "copper / Silver"]


def test_filters_leave_what_they_say(page: Any) -> None:
    def press(kind: str, value: str) -> list[str]:
        page.locator(f'nav button[data-kind="{kind}"][data-value="{value}"]').click()
        return sorted(visible_cards(page))

    assert press("task", "TextVQA") == ["TextVQA 34602", "TextVQA 34603"]
    assert press("verdict", "right") == ["TextVQA 34602"]
    assert page.locator("output").inner_text() == "1 sample"
    assert press("task", "all") == ["OCRBench 0", "OCRBench 1", "TextVQA 34602"]
    assert press("verdict", "changed") == ["OCRBench 1"]
    assert press("verdict", "wrong") == ["OCRBench 2"]
    pressed = page.locator("nav button[aria-pressed=true]").all_inner_texts()
    assert pressed == ["all", "wrong"]


def test_a_click_shows_the_tiles_large_and_escape_closes_them(page: Any) -> None:
    card = page.locator("figure", has_text="TextVQA 34603")
    card.locator(".picture").click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    shown = dialog.locator("img").get_attribute("src")
    assert shown == card.locator("img.tiles").get_attribute("src")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0


def test_the_difference_is_drawn_where_it_was_measured(page: Any) -> None:
    """OCRBench is 2 points in both runs: the mark stands on zero."""
    article = page.locator("article", has_text="OCRBench")
    mark = article.locator(".interval .value").get_attribute("x1")
    assert float(mark) == pytest.approx(50)
    assert "answers that differ: 1" in article.locator("summary").inner_text()
