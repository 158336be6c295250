"""What an answer must match, as the library, a JSON line and the flags take it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import run
from nvlm.program.errors import UserError
from runtime.answers.run_record import settings_of
from runtime.requests.flags import request_of
from runtime.requests.guide import GUIDES, MAX_GUIDE_BYTES, Guide
from runtime.requests.request_file import request_from_json
from runtime.requests.types import GenerationRequest

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
GRAMMAR = 'start: "a" | "b"'
GIVEN: dict[str, Any] = {
    "json_schema": SCHEMA,
    "json_object": True,
    "regex": "[a-c]+",
    "choice": ["yes", "no"],
    "grammar": GRAMMAR,
}
DEFAULTS = GenerationRequest(())


def of_library(given: dict[str, Any]) -> Guide | None:
    return GenerationRequest.images_first("q", **given).guide


def of_line(given: dict[str, Any]) -> Guide | None:
    return request_from_json({"prompt": "q", **given}, Path(), DEFAULTS).guide


def of_flags(given: dict[str, Any]) -> Guide | None:
    words: list[str] = []
    for name, value in given.items():
        texts = value if isinstance(value, list) else [value]
        texts = [json.dumps(text) if isinstance(text, dict) else text for text in texts]
        words += [f"--{name}", *(texts if value is not True else [])]
    return request_of(run.parser().parse_args(["--engine_dir", "e", "--prompt", "q", *words])).guide


DOORS = [of_library, of_line, of_flags]


@pytest.mark.parametrize("name", [kind.name for kind in GUIDES])
def test_every_door_takes_every_guide_by_its_name(name: str) -> None:
    for door in DOORS:
        guide = door({name: GIVEN[name]})
        assert guide is not None
        assert guide.name == name
        if name == "json_schema":
            assert json.loads(guide.text) == SCHEMA


def test_no_guide_is_asked_for_by_nothing_or_false() -> None:
    for door in (of_library, of_line):
        assert door({}) is None
        assert door({"json_object": False}) is None
    assert of_flags({}) is None


@pytest.mark.parametrize("door", DOORS)
def test_two_guides_are_refused_by_their_names(door: Any) -> None:
    with pytest.raises(UserError, match="regex and choice are both given"):
        door({"regex": "a", "choice": ["a"]})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("json_schema", [], r"json_schema is \[\], expected a JSON schema"),
        ("json_schema", 5, "json_schema is 5, expected a JSON schema"),
        ("json_schema", {"a": float("nan")}, "json_schema is not JSON"),
        ("json_schema", {"a": "x" * MAX_GUIDE_BYTES}, "bytes, expected 131,072 at most"),
        ("json_object", "yes", "json_object is 'yes', expected true or false"),
        ("regex", "", "regex is '', expected a regular expression"),
        ("regex", "a" * (MAX_GUIDE_BYTES + 1), "regex has 131,073 bytes"),
        ("regex", ["a"], r"regex is \['a'\]"),
        ("choice", [], r"choice is \[\], expected a list of texts, none of them empty"),
        ("choice", ["a", ""], "choice is"),
        ("choice", ["a", 5], "choice is"),
        ("choice", "abc", "choice is 'abc'"),
        ("grammar", " ", "grammar is ' '"),
    ],
)
def test_bad_values_are_refused_in_one_line(name: str, value: Any, message: str) -> None:
    for door in (of_library, of_line):
        with pytest.raises(UserError, match=message) as raised:
            door({name: value})
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500


def test_stop_strings_and_a_guide_contradict_each_other() -> None:
    with pytest.raises(UserError, match="stop is given beside regex, whose answer it would cut"):
        GenerationRequest.images_first("q", stop=("x",), regex="a")


def test_flags_read_schema_and_grammar_from_files(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA, ensure_ascii=False))
    (tmp_path / "g.lark").write_text(GRAMMAR)
    assert of_flags({"json_schema": str(tmp_path / "s.json")}) == Guide.of("json_schema", SCHEMA)
    guide = of_flags({"grammar": str(tmp_path / "g.lark")})
    assert guide == Guide("grammar", GRAMMAR)
    with pytest.raises(UserError, match=r"--json_schema nowhere\.json cannot be read"):
        of_flags({"json_schema": "nowhere.json"})
    with pytest.raises(UserError, match=r'--grammar strt: "a" cannot .* has a rule start:'):
        of_flags({"grammar": 'strt: "a"'})
    (tmp_path / "large").write_text("{" * (2 * MAX_GUIDE_BYTES))
    with pytest.raises(UserError, match="at most"):
        of_flags({"json_schema": str(tmp_path / "large")})


def test_a_file_that_is_too_large_is_refused_for_that(tmp_path: Path) -> None:
    """Wherever the reading ends, also within a character."""
    path = tmp_path / "large.json"
    for beginning in (" ", "  "):
        path.write_text(beginning + "é" * 600_000, "utf-8")
        with pytest.raises(UserError, match="expected 131,072 at most") as raised:
            of_flags({"json_schema": str(path)})
        assert "\n" not in str(raised.value)


def test_a_choice_is_an_expression_that_matches_its_texts_alone() -> None:
    texts = ["a.b", "(x)|[y]", "{1}^$", "1+1*?", "back\\slash", "tab\tand\nline", "é 日本/\"'"]
    guide = Guide.of("choice", texts)
    assert guide is not None
    for text in texts:
        assert re.fullmatch(guide.pattern, text), text
    assert not re.fullmatch(guide.pattern, "aXb")


def test_a_run_record_distinguishes_guides() -> None:
    asked = {name: GenerationRequest.images_first("q", **{name: GIVEN[name]}) for name in GIVEN}
    found = {name: settings_of(request) for name, request in asked.items()}
    assert all(name in settings for name, settings in found.items())
    assert found["json_object"]["json_object"] is True
    assert not settings_of(GenerationRequest.images_first("q")).keys() & GIVEN.keys()
