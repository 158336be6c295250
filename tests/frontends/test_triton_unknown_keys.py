"""Keys that nobody reads, at the real server: refused by name, while Triton's own pass."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.support.cases import PHOTO
from tests.support.triton_server import Served, Stream, Streamed, tensors

DATA = base64.b64encode(PHOTO.read_bytes()).decode()
QUESTION = {"text_input": "What?", "max_tokens": 4}

UNKNOWN: list[tuple[str, Any, str]] = [
    ("image", DATA, "did you mean 'image_base64'?"),
    ("images", DATA, "did you mean 'image_base64'?"),
    ("image_bas64", DATA, "did you mean 'image_base64'?"),
    ("prompt", "What?", "did you mean 'text_input'?"),
    ("max_new_tokens", 4, "did you mean 'max_tokens'?"),
    ("stop", "x", "did you mean 'stop_words'?"),
    ("prompt_format", "hf", "docs/triton.md lists them"),
    ("min_length", 8, "did you mean 'min_tokens'?"),
    ("logprobs", True, "did you mean 'return_log_probs'?"),
    ("random_seed", 3, "did you mean 'seed'?"),
    ("regex", "a+", "did you mean 'guided_decoding_guide'?"),
    ("json_object", True, "did you mean 'guided_decoding_guide_type'?"),
    ("num_return_sequences", 2, "did you mean 'n'?"),
    ("max_num_tile", 1, "did you mean 'max_num_tiles'?"),
    ("runtime_top_k", 5, "did you mean 'top_k'?"),
    ("temprature", 0.5, "did you mean 'temperature'?"),
    ("Temperature", 0.5, "did you mean 'temperature'?"),
    ("top-p", 0.5, "did you mean 'top_p'?"),
    ("a_key_of_mine", 1, "docs/triton.md lists them"),
]


@pytest.mark.parametrize("model", ["nvlm", "ensemble"])
@pytest.mark.parametrize(("key", "value", "message"), UNKNOWN, ids=[key for key, *_ in UNKNOWN])
def test_an_unknown_key_is_refused_by_name_with_the_nearest_known_one(
    triton_server: Served, model: str, key: str, value: Any, message: str
) -> None:
    found = triton_server.generate(model, **QUESTION, **{key: value})
    assert found.get("status") == 400, found
    assert f"{key} is no input of this server; {message}" in found["error"]
    assert len(found["error"]) < 300, "it repeats the picture"


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, [1]], ids=str)
@pytest.mark.parametrize("model", ["nvlm", "ensemble"])
def test_an_unknown_key_that_holds_more_than_one_value_is_refused_too(
    triton_server: Served, model: str, value: Any
) -> None:
    found = triton_server.generate(model, **QUESTION, images=value)
    assert found.get("status") == 400, found
    assert "images" in found["error"]


def test_an_input_that_comes_as_a_parameter_is_refused(triton_server: Served) -> None:
    """`system` is none of ensemble's inputs; and gRPC has parameters beside its inputs."""
    found = triton_server.generate("ensemble", **QUESTION, system="Be brief.")
    assert "system came as a parameter, where nobody reads it" in found["error"]
    for name in ("temperature", "seed"):
        error = stream_with(triton_server, {name: 1}).error
        assert error is not None
        assert f"{name} came as a parameter" in error


def stream_with(served: Served, parameters: dict[str, Any]) -> Streamed:
    with Stream(served) as stream:
        stream.send("one", tensors("What?", 4), parameters=parameters)
        stream.finish()
        return stream.answers["one"]


def test_what_triton_itself_reads_passes(triton_server: Served) -> None:
    expected = triton_server.generate(**QUESTION)["text_output"]
    for own in ({"id": "mine"}, {"priority": 1}, {"timeout": 60_000_000}):
        for model in ("nvlm", "ensemble"):
            found = triton_server.generate(model, **QUESTION, **own)
            assert found.get("text_output") == expected, (own, model, found)


def test_a_number_that_does_not_fit_is_cut_by_triton_before_we_see_it(
    triton_server: Served,
) -> None:
    """As docs/triton.md says: over JSON, to the input's 32 bits."""
    found = triton_server.generate(text_input="What?", max_tokens=2**32 + 3)
    assert found["num_tokens"] == 3
