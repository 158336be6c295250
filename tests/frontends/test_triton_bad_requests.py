"""Bad requests to the real Triton server: a code, a sentence, and the next request works."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from PIL import Image

from tests.commands.test_bad_input_image import one_bit_png
from tests.support.cases import PHOTO
from tests.support.triton_server import Served, ask, tensors

GOOD = PHOTO.read_bytes()
EMPTY_PIXELS = np.zeros((1, 1, 0, 5, 3), np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def pixel_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def half(*shape: int, value: float = 0.0) -> np.ndarray[Any, Any]:
    return np.full(shape, value, np.float16)


Make = Callable[[], list[grpcclient.InferInput]]
BAD: list[tuple[str, Make, str]] = [
    ("no_prompt", lambda: tensors("x", 4)[1:], "text_input"),
    ("no_max_tokens", lambda: tensors("x", 4)[:1], "max_tokens"),
    ("empty_prompt", lambda: tensors("", 4), "text_input is empty"),
    ("max_tokens_negative", lambda: tensors("x", -4), "max_tokens is -4, expected 1 or more"),
    ("max_tokens_zero", lambda: tensors("x", 0), "max_tokens is 0"),
    ("prompt_too_long", lambda: tensors("word " * 3000, 4), "the engine takes 1300; shorten"),
    ("prompt_of_10_mb", lambda: tensors("a" * 10_000_000, 4), "10,000,0"),
    ("not_utf8", lambda: tensors(b"ab\xff\xfe", 4), "text_input is not UTF-8"),
    (
        "stop_word_not_utf8",
        lambda: tensors("x", 4, stop_words=[b"\xff"]),
        "stop_words is not UTF-8",
    ),
    ("corrupt_image", lambda: tensors("x", 4, image_bytes=[GOOD[:5000]]), "not a whole image"),
    (
        "text_as_image",
        lambda: tensors("x", 4, image_bytes=[b"/etc/passwd"]),
        "is none of PNG, JPEG",
    ),
    ("empty_image", lambda: tensors("x", 4, image_bytes=[b""]), "0 bytes"),
    ("good_and_bad", lambda: tensors("x", 4, image_bytes=[GOOD, GOOD[:40]]), "not a whole image"),
    ("good_and_other", lambda: tensors("x", 4, image_bytes=[GOOD, b"no"]), "image 2 of 2 is none"),
    (
        "bomb",
        lambda: tensors("x", 4, image_bytes=[one_bit_png(30000, 30000, b"")]),
        "more than 178,956,970 pixels",
    ),
    ("1000_images", lambda: tensors("x", 4, image_bytes=[pixel_png()] * 1000), "1000 images"),
    (
        "1000_pixel_images",
        lambda: tensors("x", 4, image_bytes_input=np.zeros((1, 1000, 2, 2, 3), np.uint8)),
        "1000 images",
    ),
    ("not_base64", lambda: tensors("x", 4, image_base64=[b"!!!"]), "image_base64 is not base64"),
    ("http_url", lambda: tensors("x", 4, image_url_input=[b"http://x/y.png"]), "fetches nothing"),
    ("file_url", lambda: tensors("x", 4, image_url_input=[b"file:///x.png"]), "fetches nothing"),
    ("path", lambda: tensors("x", 4, image_url_input=[b"/x.png"]), "fetches nothing"),
    ("data_url", lambda: tensors("x", 4, image_url_input=[b"data:,abc"]), "not base64"),
    ("marks", lambda: tensors("<image>", 4), "in the text is 1 and that of images 0"),
    ("messages_no_json", lambda: tensors("", 4, messages="[{"), "messages is not JSON"),
    ("messages_empty", lambda: tensors("", 4, messages="[]"), "messages is empty"),
    ("messages_and_text", lambda: tensors("x", 4, messages="[]"), "leave it empty"),
    (
        "messages_role",
        lambda: tensors("", 4, messages='[{"role": "tool", "content": "x"}]'),
        "message 1 has role 'tool'",
    ),
    (
        "messages_path",
        lambda: tensors(
            "",
            4,
            messages='[{"role": "user", "content": [{"type": "image", "image": "/etc/hosts"}]}]',
        ),
        "a part of messages may only hold data: URLs",
    ),
    (
        "two_kinds",
        lambda: tensors("x", 4, image_bytes=[GOOD], image_base64=[base64.b64encode(GOOD)]),
        "give one of them",
    ),
    (
        "grey_pixels",
        lambda: tensors("x", 4, image_bytes_input=np.zeros((1, 1, 5, 5, 1), np.uint8)),
        "RGB pixels",
    ),
    (
        "sizes_too_small",
        lambda: tensors(
            "x",
            4,
            image_bytes_input=np.zeros((1, 1, 5, 5, 3), np.uint8),
            image_sizes_input=np.array([[[0, -7]]], np.int64),
        ),
        "RGB pixels",
    ),
    ("tiles_too_large", lambda: tensors("x", 4, image_input=half(1, 1, 3, 63, 63)), "56 x 56"),
    ("too_many_tiles", lambda: tensors("x", 4, image_input=half(1, 8, 3, 56, 56)), "1 to 7 tiles"),
    (
        "not_normalised",
        lambda: tensors("x", 4, image_input=half(1, 1, 3, 56, 56, value=200.0)),
        "not normalised",
    ),
    (
        "nan_tiles",
        lambda: tensors("x", 4, image_input=half(1, 1, 3, 56, 56, value=float("nan"))),
        "not normalised",
    ),
    ("empty_pixels", lambda: tensors("x", 4, image_bytes_input=EMPTY_PIXELS), "RGB pixels"),
    ("eps", lambda: tensors("x", 4, image_bytes=[EPS]), "is none of PNG, JPEG"),
    ("stop_words", lambda: tensors("x", 4, stop_words=[b"a"] * 65), "65 stop_words"),
    (
        "video",
        lambda: tensors("x", 4, video_bytes_input=np.zeros((1, 2, 2, 2, 3), np.uint8)),
        "video",
    ),
    ("beam_search", lambda: tensors("x", 4, beam_width=4), "beam_width is not supported"),
    ("logits", lambda: tensors("x", 4, return_context_logits=True), "return_context_logits"),
    ("repetition", lambda: tensors("x", 4, repetition_penalty=0.0), "repetition_penalty is 0.0"),
    ("presence", lambda: tensors("x", 4, presence_penalty=2.5), "presence_penalty is 2.5"),
    ("top_logprobs", lambda: tensors("x", 4, top_logprobs=3), "without logprobs"),
    ("min_tokens", lambda: tensors("x", 4, min_tokens=5), "min_tokens is 5 and max_new_tokens 4"),
    ("n_greedy", lambda: tensors("x", 4, n=2), "the sampling is greedy"),
    ("n_too_large", lambda: tensors("x", 4, n=999, temperature=1.0), "max_batch_size"),
    ("bias", lambda: tensors("x", 4, logit_bias=b"[1"), "logit_bias is not JSON"),
    ("bias_nested", lambda: tensors("x", 4, logit_bias=b"[" * 99_999), "logit_bias is not JSON"),
    (
        "bias_words",
        lambda: tensors("x", 4, embedding_bias_words=[b"a", b"b"], embedding_bias_weights=1.0),
        "2 embedding_bias_words and 1 embedding_bias_weights",
    ),
    ("top_p", lambda: tensors("x", 4, top_p=1.5), "top_p is 1.5"),
    ("temperature", lambda: tensors("x", 4, temperature=float("nan")), "temperature is nan"),
    ("top_k", lambda: tensors("x", 4, top_k=-1), "top_k is -1"),
    ("max_num_tiles", lambda: tensors("x", 4, max_num_tiles=99), "max_num_tiles is 99"),
    ("two_questions", lambda: two_questions(), "batch-size must be <= 1"),
    (
        "unknown guide",
        lambda: tensors("x", 4, guided_decoding_guide_type="ebnf_grammar"),
        "guided_decoding_guide_type is 'ebnf_grammar', expected one of json_schema, json, regex",
    ),
    (
        "guide without a type",
        lambda: tensors("x", 4, guided_decoding_guide="a"),
        "given without guided_decoding_guide_type",
    ),
    (
        "guide that no answer is held to",
        lambda: tensors(
            "x", 4, guided_decoding_guide_type="json_schema", guided_decoding_guide='{"not": {}}'
        ),
        "json_schema has the keyword 'not'",
    ),
    (
        "choice that is no list",
        lambda: tensors("x", 4, guided_decoding_guide_type="choice", guided_decoding_guide="a"),
        "guided_decoding_guide is no JSON list of texts",
    ),
]


def two_questions() -> list[grpcclient.InferInput]:
    return [
        grpcclient.InferInput("text_input", [2, 1], "BYTES").set_data_from_numpy(
            np.array([[b"x"], [b"y"]], np.object_)
        ),
        grpcclient.InferInput("max_tokens", [2, 1], "INT32").set_data_from_numpy(
            np.array([[4], [4]], np.int32)
        ),
    ]


@pytest.fixture(scope="module")
def good_text(triton_server: Served) -> str:
    return ask(triton_server, tensors("Well?", 6)).text


@pytest.mark.parametrize("make", [row[1] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_request_is_refused_in_a_sentence_and_the_next_one_works(
    triton_server: Served, good_text: str, make: Make, request: pytest.FixtureRequest
) -> None:
    fragment = {name: message for name, _, message in BAD}[request.node.callspec.id]
    answer = ask(triton_server, make())
    assert answer.error is not None, answer.text
    assert fragment in answer.error
    assert "Traceback" not in answer.error
    assert ask(triton_server, tensors("Well?", 6)).text == good_text


@pytest.mark.parametrize("model", ["nvlm", "ensemble"])
def test_http_gives_a_code_and_a_sentence(triton_server: Served, model: str) -> None:
    for fields, message in (
        ({"text_input": "x"}, "max_tokens"),
        ({"text_input": "x", "max_tokens": -1}, "expected 1 or more"),
        ({"text_input": "x", "max_tokens": 4, "image_url_input": "http://x/"}, "fetches nothing"),
    ):
        answer = triton_server.generate(model, **fields)
        assert answer["status"] == 400
        assert message in answer["error"]


def test_nothing_is_fetched_on_a_clients_word(triton_server: Served) -> None:
    """Someone listens where every field points; nobody comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        for name in ("image_url_input", "image_bytes", "image_base64"):
            assert ask(triton_server, tensors(url, 4, **{name: [url.encode()]})).error is not None
        assert ask(triton_server, tensors(url, 4)).error is None
        with pytest.raises(TimeoutError):
            listener.accept()
