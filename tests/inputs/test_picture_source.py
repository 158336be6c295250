"""What names a picture: paths, data: and file: URLs; addresses are named as such."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvlm.inputs import picture_source as module
from nvlm.inputs.picture_source import picture_source
from nvlm.program.errors import UserError
from tests.support.asking import Images, answered, ask, batch, run_refused
from tests.support.command import RUN, run_command


@pytest.fixture
def photo(images: Images) -> Path:
    return images("photo_36x36.png")


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def answer_of(engine_dir: Path, *flags: object) -> Any:
    values = answered(engine_dir, "--prompt", "hi", *flags)
    return values["token_ids"], values["num_tiles"]


def test_a_data_or_file_url_is_the_picture_itself(
    engine_dir: Path, tmp_path: Path, photo: Path
) -> None:
    spaced = tmp_path / "fö to#1?.png"
    spaced.write_bytes(photo.read_bytes())
    expected = answer_of(engine_dir, "--image", photo)
    for name in (
        data_url(photo),
        data_url(photo).replace("data:", "DATA:", 1),
        data_url(photo).replace(";base64,", ";name=a.png; base64, ", 1),
        data_url(photo).replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        photo.as_uri(),
        photo.as_uri().replace("file:///", "file://LocalHost/"),
        photo.as_uri().replace("file:///", "file:/"),
        spaced.as_uri(),
    ):
        assert answer_of(engine_dir, "--image", name) == expected, name[:30]


def test_a_request_line_takes_the_same_urls(engine_dir: Path, tmp_path: Path, photo: Path) -> None:
    url = data_url(photo)
    chat = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "\nhi"}]
    lines: list[dict[str, Any]] = [
        {"id": "path", "prompt": "hi", "images": [str(photo)]},
        {"id": "data", "prompt": "hi", "images": [url]},
        {"id": "file", "prompt": "hi", "images": [photo.as_uri()]},
        {"id": "chat", "prompt": chat},
    ]
    answers = batch(engine_dir, tmp_path, lines)
    assert len({json.dumps(answer["token_ids"]) for answer in answers}) == 1
    assert [answer["num_tiles"] for answer in answers] == [1, 1, 1, 1]


def test_another_picture_in_a_data_url_is_another_request(
    engine_dir: Path, tmp_path: Path, photo: Path
) -> None:
    input_file, output_file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    flags = ask(engine_dir, "--input_file", input_file, "--output_file", output_file)
    other = tmp_path / "other.png"
    Image.new("RGB", (36, 36)).save(other)
    for path, exit_code in ((photo, 0), (photo, 0), (other, 2)):
        input_file.write_text(json.dumps({"prompt": "hi", "images": [data_url(path)]}) + "\n")
        assert run_command(RUN, *flags).exit_code == exit_code


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/a.png", "is an address, and nothing is fetched from https: here"),
        ("HTTP://example.org/a.png", "is an address"),
        ("s3://bucket/a.png", "nothing is fetched from s3: here"),
        ("file://server/share/a.png", "is on another machine"),
        ("file:///a.png?size=2", "%3F and %23"),
        ("data:image/svg+xml,%3Csvg/%3E", "is not base64, expected data:image/png;base64"),
        ("data:image/png;base64,####", "an image is not base64"),
        ("data:image/png;base64,_-8=", "expected letters, digits, + and /"),
        ("data:image/png;base64,QUJ", "(Incorrect padding), expected"),
        ("data:image/png;base64", "is not base64, expected data:image/png;base64"),
        ("QUJD" * 200, "image QUJDQUJDQUJDQUJDQUJDQUJDQUJDQUJD... (800 characters) is base64"),
    ],
)
def test_what_is_not_here_is_reported_with_what_helps(name: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        picture_source(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_broken_data_url_is_not_repeated(engine_dir: Path, tmp_path: Path) -> None:
    url = f"data:image/png;base64,{'QUJD' * 5000}"
    line = run_refused(
        engine_dir, tmp_path, "--image", url, "--prompt", "hi", fragments=("not a whole image",)
    )
    assert len(line) < 300
    (answer,) = batch(engine_dir, tmp_path, [{"prompt": [{"image": url}]}], exit_code=1)
    assert len(answer["error"]) < 500


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """Three pages of other sizes: one tile, three and seven."""
    pages = [Image.new("RGB", size, "white") for size in ((40, 40), (200, 100), (300, 200))]
    path = tmp_path / "scan.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def test_a_page_is_chosen_by_its_number_or_all_become_images(
    engine_dir: Path, tmp_path: Path, scan: Path
) -> None:
    for flags, num_tiles in (((), 1), (("--page", 2), 3), (("--page", "3"), 7)):
        assert answer_of(engine_dir, "--image", scan, *flags)[1] == num_tiles
    everything = answered(engine_dir, "--prompt", "hi", "--image", scan, "--page", "all")
    assert everything["grids"] == [[1, 1], [2, 1], [3, 2]]
    pages = []
    for number in (0, 1, 2):
        with Image.open(scan) as image:
            image.seek(number)
            image.save(tmp_path / f"{number}.png")
        pages.append(tmp_path / f"{number}.png")
    alone = answered(engine_dir, "--prompt", "hi", "--image", *pages)
    for field in ("token_ids", "num_prompt_tokens", "num_tiles"):
        assert alone[field] == everything[field], "pages stand as images do"


def test_a_line_chooses_its_page_and_the_flag_is_for_the_others(
    engine_dir: Path, tmp_path: Path, scan: Path
) -> None:
    lines = [
        {"prompt": "hi", "images": ["scan.tif"], "page": 2},
        {"prompt": "hi", "images": ["scan.tif"], "page": "all"},
        {"prompt": "hi", "images": ["scan.tif"]},
    ]
    assert [answer["num_tiles"] for answer in batch(engine_dir, tmp_path, lines)] == [3, 11, 1]
    files = ("--input_file", tmp_path / "requests.jsonl", "--output_file", tmp_path / "b.jsonl")
    assert run_command(RUN, *ask(engine_dir, *files, "--page", 3)).exit_code == 0
    answers = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [answer["num_tiles"] for answer in answers] == [3, 11, 7]


@pytest.mark.parametrize("page", [0, -1, 1.5, True, "two", [1]])
def test_a_page_that_is_no_number_is_refused_by_name(
    engine_dir: Path, tmp_path: Path, scan: Path, page: object
) -> None:
    line = {"prompt": "hi", "images": [scan.name], "page": page}
    (answer,) = batch(engine_dir, tmp_path, [line], exit_code=1)
    assert 'expected a number from 1 or "all"' in answer["error"]
    scan.unlink()
    for file in ("requests.jsonl", "answers.jsonl", "answers.jsonl.run.json"):
        (tmp_path / file).unlink()
    flags = ("--prompt", "hi", "--image", scan, "--page", page)
    run_refused(engine_dir, tmp_path, *flags, fragments=("--page", "neither a page's number"))


def test_flags_of_pictures_without_one_are_refused(engine_dir: Path, tmp_path: Path) -> None:
    flags = ("--prompt", "hi", "--page", "2")
    run_refused(engine_dir, tmp_path, *flags, fragments=("--page", "--image"))


def test_more_pages_than_the_engine_takes_images_are_refused(
    engine_dir: Path, tmp_path: Path, scan: Path, photo: Path
) -> None:
    flags = ("--prompt", "hi", "--image", photo, scan, "--page", "all")
    run_refused(
        engine_dir,
        tmp_path,
        *flags,
        fragments=("scan.tif has 3 pages", "room for 2", "--page N", "--max_num_images"),
    )


def test_the_largest_picture_is_chosen_by_a_flag(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    path = tmp_path / "large.png"
    Image.new("1", (1000, 900)).save(path)
    flags = ("--prompt", "hi", "--image", path, "--max_image_pixels")
    run_refused(engine_dir, tmp_path, *flags, 100_000, fragments=("more than 100,000 pixels",))
    assert answer_of(engine_dir, *flags[2:], 900_000)[1] > 1


@pytest.mark.parametrize("piece", [4, 8, 12])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"QUJD",
        b"QUJDREVGR0hJSktM",
        b"QUJDREVGR0hJSg==",
        b"QUJDREVGR0hJSks=",
        b"QU JD\r\nREVG\tR0hJ SktM",
        b"QUJD=UVGR0hJSktM",
        b"QUI=REVG",
        b"QQ==QUJD",
        b"QUJDREVG=",
        b"QUJDREVGR",
        b"QUJDREV",
        b"=",
        b"QU!DREVG",
        b"QUJDREVGR0h\xffSktM",
    ],
)
def test_base64_in_pieces_is_read_or_refused_as_a_whole(
    data: bytes, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(decode: Callable[[], bytes]) -> bytes | str:
        try:
            return decode()
        except binascii.Error as error:
            return str(error)

    monkeypatch.setattr(module, "_PIECE_CHARACTERS", piece)
    whole = of(lambda: base64.b64decode(b"".join(data.split()), validate=True))
    assert of(lambda: module._decoded(data)) == whole
