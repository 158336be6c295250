"""Guided questions through the runner: with pictures, in pieces, together, of a trained model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.program.errors import UserError
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.runner import Runner
from tests.conftest import FP8, Workshop
from tests.support.command import run_command
from tests.support.schemas import random_choice, random_regex, random_schema

MODEL = Path(__file__).parents[2] / "models" / "nvlm-d-tiny"
RUN = "run"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "n": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["kind", "n"],
    "additionalProperties": False,
}

Images = Callable[[str], Path]


@pytest.fixture(scope="module")
def random_runner(float32_engine_dir: Path) -> Iterator[Runner]:
    with Runner.open(float32_engine_dir, "cpu") as runner:
        yield runner


def ask(number: int, most: int = 120, **guide: Any) -> GenerationRequest:
    return GenerationRequest.images_first(
        "What?", max_new_tokens=most, temperature=1.0, seed=number, **guide
    )


def test_pictures_pieces_and_company_change_no_guided_answer(
    random_runner: Runner, images: Images
) -> None:
    picture = images("landscape_800x450.png")
    guides: list[dict[str, Any]] = [{"json_schema": SCHEMA}, {"choice": ["yes", "no"]}, {}]
    # Company without a guide is greedy. A draw among all tokens falls so near the edge of two, once
    # in some thousand tokens, that the last bits of a batch's products decide.
    asked = [
        GenerationRequest.images_first(
            "What?", pictures, max_new_tokens=80, **({**g, "seed": i, "top_p": 0.9} if g else {})
        )
        for i, g in enumerate(guides)
        for pictures in ((), (picture,))
    ]
    alone = [random_runner.generate(request) for request in asked]
    together = dict(random_runner.generate_batch(asked))
    for index, (request, expected) in enumerate(zip(asked, alone, strict=True)):
        found = together[index]
        assert isinstance(found, GenerationResult)
        assert found.token_ids == expected.token_ids
        pieces = list(random_runner.stream(request))
        assert "".join(piece.text for piece in pieces) == expected.text
        if request.guide is not None and expected.finish_reason == "stop":
            assert expected.text in ("yes", "no") or valid(expected.text, SCHEMA)


def test_n_guided_answers_are_those_of_n_requests(random_runner: Runner, images: Images) -> None:
    picture = images("landscape_800x450.png")
    asked: dict[str, Any] = {"json_schema": SCHEMA, "temperature": 1.5, "max_new_tokens": 80}
    result = random_runner.generate("What?", picture, n=4, seed=7, **asked)
    for seed, choice in enumerate(result.choices, start=7):
        alone = random_runner.generate("What?", picture, seed=seed, **asked)
        assert (alone.token_ids, alone.finish_reason) == (choice.token_ids, choice.finish_reason)
        assert choice.finish_reason == "length" or valid(choice.text, SCHEMA)
    assert len({choice.text for choice in result.choices}) > 1


def test_a_turn_of_a_conversation_may_have_a_guide(random_runner: Runner, images: Images) -> None:
    shown = {"type": "image", "image": str(images("pixel_1x1.png"))}
    messages = [
        {"role": "user", "content": [shown, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A pixel."},
        {"role": "user", "content": "Sure?"},
    ]
    result = random_runner.generate(messages=messages, choice=["yes", "no"], max_new_tokens=9)
    assert result.text in ("yes", "no")


def test_what_would_cut_or_prolong_a_guided_answer_is_refused(random_runner: Runner) -> None:
    for name, value in (("stop", ["x"]), ("ignore_eos", True)):
        with pytest.raises(UserError, match=f"{name} is given beside regex, whose answer"):
            random_runner.generate("What?", regex="a+", **{name: value})


def test_an_answer_that_is_complete_at_its_limit_is_no_cut_one(random_runner: Runner) -> None:
    result = random_runner.generate(ask(0, 3, regex="[a-c]{3}"))
    assert (result.num_tokens, result.finish_reason) == (3, "stop")
    result = random_runner.generate(ask(0, 2, regex="[a-c]{3}"))
    assert (result.num_tokens, result.finish_reason) == (2, "length")


def test_bad_guides_end_their_own_questions(random_runner: Runner) -> None:
    asked = [ask(0, regex="[ab]{2}"), ask(1, regex="(a"), ask(2, json_schema={"not": {}})]
    found = dict(random_runner.generate_batch(asked))
    assert isinstance(found[0], GenerationResult)
    assert "unclosed group" in str(found[1])
    assert isinstance(found[2], UserError)


def test_the_program_says_that_an_answer_was_cut(
    float32_engine_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--engine_dir", float32_engine_dir, "--device", "cpu", "--prompt", "What?")
    whole = run_command(RUN, *flags, "--choice", "yes", "no")
    assert (whole.exit_code, whole.stdout.strip() in ("yes", "no")) == (0, True)
    for more in ((), ("--streaming",), ("--json",)):
        caplog.clear()
        cut = run_command(RUN, *flags, "--regex", "[ab]{9}", "--max_new_tokens", 4, *more)
        assert cut.exit_code == 1
        assert "was cut after 4 tokens and does not match regex" in caplog.text
    end = Tokenizer(float32_engine_dir / "tokenizer").special_id(IM_END)
    endless = ("--regex", "a+", "--logit_bias", json.dumps({end: -100}), "--max_new_tokens", 9)
    caplog.clear()
    cut = run_command(RUN, *flags, *endless)
    assert (cut.exit_code, set(cut.stdout.strip())) == (1, {"a"})
    assert "was cut after 9 tokens and does not match regex" in caplog.text
    refused = run_command(RUN, *flags, "--json_schema", '{"uniqueItems": true}')
    assert refused.exit_code == 2
    assert "'uniqueItems'" in refused.stderr
    lines = [{"prompt": "a", "json_schema": SCHEMA}, {"prompt": "b", "regex": "(a"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = ("--input_file", tmp_path / "in.jsonl", "--output_file", tmp_path / "out.jsonl")
    assert run_command(RUN, *flags[:4], *files).exit_code == 1
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["finish_reason"] == "length" or valid(first["text"], SCHEMA)
    assert "unclosed group" in second["error"]


def valid(text: str, schema: dict[str, Any]) -> bool:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return True


def check_random_schemas(runner: Runner, seeds: range) -> None:
    schemas = {seed: random_schema(seed) for seed in seeds}
    asked = [ask(seed, 200, json_schema=schema) for seed, schema in schemas.items()]
    num_ended = 0
    for index, found in runner.generate_batch(asked):
        if isinstance(found, UserError):
            assert "json_schema" in str(found)
        elif found.finish_reason == "stop":
            num_ended += 1
            assert valid(found.text, schemas[seeds[index]])
    assert num_ended > 0.5 * len(seeds)


def check_random_expressions_and_choices(runner: Runner, seeds: range) -> None:
    asked = []
    for seed in seeds:
        form = {"regex": random_regex(seed)} if seed % 2 else {"choice": random_choice(seed)}
        asked.append(ask(seed, 100, **form))
    num_ended = 0
    for index, found in runner.generate_batch(asked):
        guide = asked[index].guide
        assert guide is not None
        assert isinstance(found, GenerationResult), (guide, found)
        if found.finish_reason == "stop":
            num_ended += 1
            if guide.name == "choice":
                assert found.text in json.loads(guide.text)
            # Python's own \s has four control characters that ECMAScript's has not.
            assert re.fullmatch(guide.pattern, found.text, re.ASCII), (guide, found.text)
    assert num_ended > 0.9 * len(seeds)


def test_answers_of_a_random_model_validate(random_runner: Runner) -> None:
    check_random_schemas(random_runner, range(16))


def test_answers_of_a_random_model_match_expressions_and_choices(random_runner: Runner) -> None:
    check_random_expressions_and_choices(random_runner, range(24))


@pytest.fixture(scope="module")
def trained_runner(workshop: Workshop) -> Iterator[Runner]:
    checkpoint = workshop.checkpoint("tiny_model_checkpoint", MODEL, FP8)
    engine = workshop.engine("tiny_model_engine", checkpoint)
    with Runner.open(engine, torch.device("cpu")) as runner:
        yield runner


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["random_runner", "trained_runner"])
def test_a_thousand_answers_validate(model: str, request: pytest.FixtureRequest) -> None:
    check_random_schemas(request.getfixturevalue(model), range(1000))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["random_runner", "trained_runner"])
def test_a_thousand_answers_match_expressions_and_choices(
    model: str, request: pytest.FixtureRequest
) -> None:
    check_random_expressions_and_choices(request.getfixturevalue(model), range(1000))
