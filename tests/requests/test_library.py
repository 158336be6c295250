"""Asking as a library: what works, and the one sentence for what does not."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.inputs.images import PictureRules, load_image
from nvlm.program.errors import UserError
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.support.asking import Images


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    """Opened by strings."""
    with Runner.open(str(float32_engine_dir), "cpu") as runner:
        yield runner


def content_of(*images: Any) -> tuple[Any, ...]:
    return GenerationRequest.images_first("What?", images).content


def test_a_string_among_the_images_is_a_path() -> None:
    assert content_of("a.png", Path("b.png")) == (Path("a.png"), "\n", Path("b.png"), "\n", "What?")


@pytest.mark.parametrize("image", ["a.png", Path("a.png"), b"bytes", Path.cwd])
def test_one_image_needs_no_tuple(image: Any) -> None:
    expected = Path(image) if isinstance(image, str) else image
    assert GenerationRequest.images_first("q", image).content == (expected, "\n", "q")


def test_a_text_alone_is_one_text_and_one_stop_string() -> None:
    """Python would take both for a sequence of characters."""
    request = GenerationRequest("What?", stop="end")  # type: ignore[arg-type]
    assert (request.content, request.stop) == (("What?",), ("end",))
    assert GenerationRequest.images_first("q", stop="end").stop == ("end",)
    assert GenerationRequest.images_first("q", None).content == ("q",)  # type: ignore[arg-type]


def test_sampling_settings_are_given_by_their_names() -> None:
    request = GenerationRequest.images_first("q", temperature=0.8, seed=3, max_new_tokens=5)
    assert request.sampling == SamplingParams(temperature=0.8, seed=3)
    assert request.max_new_tokens == 5
    filtered = GenerationRequest.images_first("q", top_k=5)
    assert filtered.sampling == SamplingParams(temperature=1.0, top_k=5)
    both = GenerationRequest.images_first("q", sampling=SamplingParams(temperature=0.5), seed=1)
    assert both.sampling == SamplingParams(temperature=0.5, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 5}, "no setting 'max_tokens', .*; did you mean 'max_new_tokens'?"),
        ({"temprature": 1.0}, "did you mean 'temperature'?"),
        ({"beams": 4}, "no setting 'beams', expected one of bad_words, "),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number, 0 "),
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 "),
        ({"top_k": 1.5}, "top_k is 1.5, expected a number, 0 "),
        ({"image": "a.png"}, "no setting 'image', .*; did you mean 'images'?"),
        ({"system": None}, "system is None, expected a str"),
        ({"prompt_format": "chatml"}, "prompt_format is 'chatml', expected 'hf' or 'megatron'"),
        ({"max_num_tiles": "2"}, "max_num_tiles is '2', expected a whole number"),
        ({"stop": ["end", 3]}, r"stop is \('end', 3\), expected a str or several"),
        ({"end_ids": ["5"]}, "end_ids is .*, expected token ids, whole numbers"),
        ({"sampling": {"temperature": 1.0}}, "sampling is {'temperature': 1.0}, expected Sampl"),
        ({"pictures": 2}, "pictures is 2, expected PictureRules"),
        ({"page": "2"}, "page is '2', expected a number from 1 or \"all\""),
        ({"bad_words": ["a", "b\ud800"]}, r"bad_words is not valid Unicode: .* '\\ud800', at 1"),
        ({"stop": "\ud800"}, "stop is not valid Unicode"),
        ({"regex": "a\ud800"}, "regex is not valid Unicode"),
        ({"choice": ["\ud800"]}, "choice is not valid Unicode"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema is not valid Unicode"),
        ({"grammar": 'start: "\ud800"'}, "grammar is not valid Unicode"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationRequest.images_first("q", **settings)


def test_a_page_and_end_ids_are_given_as_they_come() -> None:
    request = GenerationRequest.images_first("q", "a.pdf", page=2, end_ids=5)
    assert request.pictures == PictureRules(page=2)
    assert request.end_ids == {5}
    assert GenerationRequest.images_first("q", page="all", end_ids=[5, 6]).end_ids == {5, 6}


@pytest.mark.parametrize("data", [bytearray(b"file"), memoryview(b"file")])
def test_bytes_of_any_kind_are_one_picture(data: Any) -> None:
    assert content_of(data) == (b"file", "\n", "What?")
    assert GenerationRequest.images_first("What?", data).content == content_of(data)


@pytest.mark.parametrize(
    "image",
    [3, {"a.png": 1}, [["a.png"]], torch.zeros(3, 3), object(), io.BytesIO(b"a\nb")],
    ids=lambda i: str(type(i)),
)
def test_what_is_neither_text_nor_an_image_is_refused(image: Any) -> None:
    with pytest.raises(UserError, match=r"^a question holds a \w+, expected text or an image"):
        GenerationRequest.images_first("q", image)
    with pytest.raises(UserError, match="expected text or an image"):
        GenerationRequest(("q", image))


def test_a_pillow_image_is_the_picture_of_its_file(images: Images) -> None:
    """Every golden picture is tried, whatever its mode and orientation."""
    folder = images("x").parent
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg", ".tif")]
    assert len(paths) > 10
    for path in paths:
        try:
            expected = np.asarray(load_image(path))
        except UserError:
            continue
        with Image.open(path) as image:
            pixels, newline, text = content_of(image)
        assert (newline, text) == ("\n", "What?")
        assert np.array_equal(pixels, expected), path.name


def test_a_damaged_or_empty_pillow_image_is_refused(images: Images) -> None:
    whole = images("landscape_800x450.png").read_bytes()
    half = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with half, pytest.raises(UserError, match="a Pillow image cannot be read"):
        content_of(half)
    with pytest.raises(UserError, match="a Pillow image has 0 x 5 pixels"):
        content_of(Image.new("RGB", (0, 5)))


def test_a_question_is_asked_by_its_text_images_and_settings(
    runner: Runner, images: Images
) -> None:
    path = images("landscape_800x450.png")
    request = GenerationRequest.images_first("What?", (path,), max_new_tokens=6)
    expected = runner.generate(request)
    with Image.open(path) as image:
        for given in (path, str(path), [path], image, path.read_bytes(), np.asarray(image)):
            result = runner.generate("What?", given, max_new_tokens=6)
            assert result.token_ids == expected.token_ids
            assert result.num_tiles == expected.num_tiles
    *_, last = runner.stream("What?", path, max_new_tokens=6)
    assert last.result is not None
    assert last.result.text == expected.text
    assert [index for index, _ in runner.generate_batch(["What?"])] == [0]
    drawn = runner.generate("What?", path, max_new_tokens=6, temperature=1.0, seed=1)
    assert drawn.token_ids != expected.token_ids


def test_what_generate_cannot_mean_is_refused(runner: Runner) -> None:
    with pytest.raises(UserError, match="no question is given; give it first"):
        runner.generate(prompt="What?")
    with pytest.raises(UserError, match="of type list, expected a str or a GenerationRequest"):
        runner.generate(["What?"])  # type: ignore[arg-type]
    whole = GenerationRequest(("What?",))
    with pytest.raises(UserError, match="max_new_tokens is given beside a whole"):
        runner.generate(whole, max_new_tokens=3)
    with pytest.raises(UserError, match="images is given beside a whole"):
        runner.generate(whole, "a.png")
    for one in ("What?", whole):
        with pytest.raises(UserError, match="a batch is a list of questions, found one"):
            list(runner.generate_batch(one))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_new_tokens is True, expected 1 or more"):
        runner.generate("What?", max_new_tokens=True)
    with pytest.raises(UserError, match="max_new_tokens is '3', expected 1 or more"):
        runner.generate("What?", max_new_tokens="3")


def test_a_device_that_is_none_is_refused(float32_engine_dir: Path) -> None:
    for device in ("gpu", "mps", "meta", torch.device("meta"), None, 0):
        with pytest.raises(UserError, match=r"device is .*, expected 'auto', 'cpu' or"):
            Runner.open(float32_engine_dir, device)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_reported(float32_engine_dir: Path) -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
        with pytest.raises(UserError, match="torch sees no CUDA GPU; use --device cpu"):
            Runner.open(float32_engine_dir, device)


def test_a_runner_may_be_closed_twice(float32_engine_dir: Path) -> None:
    with Runner.open(float32_engine_dir, "cpu") as runner:
        runner.close()
    runner.close()
    with pytest.raises(UserError, match="this runner is closed"):
        runner.generate("What?")
