"""Lines of a user's files end with a newline, and ids of requests equal themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm.program.errors import UserError
from nvlm.program.jsonl import read_jsonl_lines
from runtime.requests.request_file import read_requests
from runtime.requests.types import GenerationRequest

DEFAULTS = GenerationRequest(("",))


def test_a_carriage_return_alone_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"prompt":\r"a"}\r\n\r\n{"prompt": "b"}\r\r\n')
    assert read_jsonl_lines(path, "--x") == [(1, '{"prompt":\r"a"}'), (3, '{"prompt": "b"}\r')]
    lines = read_requests(path, DEFAULTS)
    assert [(line.number, line.request.content) for line in lines] == [(1, ("a",)), (3, ("b",))]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", '{"a": [NaN]}'])
def test_an_id_that_equals_nothing_is_its_lines_error(tmp_path: Path, text: str) -> None:
    """A rerun would not know its own answer by it."""
    path = tmp_path / "lines"
    path.write_text(f'{{"id": {text}, "prompt": "a"}}\n{{"id": 1.5, "prompt": "b"}}\n')
    first, second = read_requests(path, DEFAULTS)
    assert isinstance(first.request, UserError)
    assert "id is" in str(first.request)
    assert first.id == 1, "it is named by its line"
    assert second.id == 1.5


def test_a_message_quotes_two_hundred_characters_of_a_value(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    long = "x y " * 5000
    fields = ("system", "max_new_tokens", "stop", "images", "page", "temperature", "prompt_format")
    lines = [f'{{"prompt": "a", "{name}": {{"{long}": 1}}}}' for name in fields]
    lines += [f'{{"prompt": "a", "{long}": 1}}', f'{{"id": ["{long}", NaN], "prompt": "a"}}']
    path.write_text("\n".join(lines))
    for line in read_requests(path, DEFAULTS):
        assert isinstance(line.request, UserError)
        assert len(str(line.request)) < 800


def test_a_prompt_of_no_parts_is_its_lines_error(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"prompt": []}')
    (line,) = read_requests(path, DEFAULTS)
    assert "prompt is [], expected one or more parts" in str(line.request)
