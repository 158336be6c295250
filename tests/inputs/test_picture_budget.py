"""Memory for pictures is computed from their headers, granted by one budget, and kept to."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvlm.inputs import picture_budget as budget_module
from nvlm.inputs import pillow_pages
from nvlm.inputs.images import AS_REFERENCE, PictureRules, load_image, make_of_pages
from nvlm.inputs.picture import Picture
from nvlm.inputs.picture_budget import DEFAULT_BYTES, PictureBudget, most_bytes
from nvlm.inputs.picture_cost import decoding_bytes
from nvlm.inputs.tiling import Tiler
from nvlm.program.errors import UserError
from nvlm.program.process import set_most_pixels

SIZE = (1500, 1000)
TILER = Tiler(448, 6)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colours(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.effect_noise(size, 60).convert("RGB")


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> int:
    """5 MB, where 600 are usual."""
    monkeypatch.setattr(budget_module, "DEFAULT_BYTES", 5_000_000)
    return 5_000_000


def test_the_budget_is_600_mb_and_grows_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert most_bytes() == DEFAULT_BYTES == 600_000_000
    set_most_pixels(100_000)
    assert most_bytes() == 600_000_000, "a smaller limit is one of pixels"
    set_most_pixels(250_000_000)
    assert (most_bytes() or 0) > 1_000_000_000
    Image.MAX_IMAGE_PIXELS = None
    assert most_bytes() is None


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize(
    "data",
    [
        saved(colours(), "PNG"),
        saved(colours(), "WEBP"),
        saved(colours().convert("RGBA"), "PNG"),
        saved(colours(), "JPEG", progressive=True),
    ],
    ids=["png", "webp", "rgba", "progressive"],
)
def test_a_picture_beyond_the_budget_is_refused_before_it_is_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it is decoded")

    monkeypatch.setattr(Image.Image, "crop", refuse)
    with pytest.raises(UserError, match=r"^the scan takes \d+ MB of memory to read, expected at"):
        next(make_of_pages(TILER, data, "the scan"))


def test_the_flag_that_a_refusal_names_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    most = DEFAULT_BYTES
    for needed in (most + 1, 2 * most, 7 * most + 3):
        Image.MAX_IMAGE_PIXELS = 89_478_485
        with pytest.raises(UserError) as refused:
            budget_module.check_num_bytes(needed, "it")
        (number,) = re.findall(r"--max_image_pixels (\d+)", str(refused.value))
        set_most_pixels(int(number))
        budget_module.check_num_bytes(needed, "it")


def test_pixels_that_a_program_gives_count_too(small_budget: int) -> None:
    pixels = np.zeros((1000, small_budget // 4000, 3), np.uint8)
    with pytest.raises(UserError, match=r"^the picture takes .*--max_image_pixels"):
        next(make_of_pages(TILER, pixels, "the picture"))


def test_threads_hold_no_more_than_the_budget_together(small_budget: int) -> None:
    budget = PictureBudget()
    held: list[int] = []
    most_held = 0
    lock = threading.Lock()

    def read(num_bytes: int) -> None:
        nonlocal most_held
        with budget.held(num_bytes, "it"):
            with lock:
                held.append(num_bytes)
                most_held = max(most_held, sum(held))
            time.sleep(0.002)
            with lock:
                held.remove(num_bytes)

    sizes = [small_budget, small_budget // 2, small_budget // 3, 1] * 6
    threads = [threading.Thread(target=read, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert 0 < most_held <= small_budget


def test_what_a_picture_raises_frees_what_it_held() -> None:
    budget = PictureBudget()
    damaged = saved(colours((64, 64)), "PNG")[:200]
    for _ in range(3):
        with pytest.raises(UserError):
            next(make_of_pages(TILER, damaged, "it", budget=budget))
    done = threading.Event()

    def take_all() -> None:
        with budget.held(DEFAULT_BYTES, "it"):
            done.set()

    threading.Thread(target=take_all, daemon=True).start()
    assert done.wait(10)


@pytest.mark.parametrize("error", [MemoryError(), EOFError(), AttributeError("x"), OSError(5, "y")])
def test_what_scaling_raises_is_the_pictures_own_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side of more than 67 million pixels is too long for Pillow's tables: a MemoryError."""

    def fail(*_: Any) -> None:
        raise error

    data = saved(colours((64, 64)), "PNG")
    monkeypatch.setattr(Image.Image, "resize", fail)
    for source in (data, np.asarray(colours((64, 64)))):
        with pytest.raises(UserError, match=r"^the scan "):
            next(make_of_pages(TILER, source, "the scan"))


def test_a_jpeg_of_very_many_pixels_is_reduced_and_a_benchmarks_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = saved(colours(), "JPEG", quality=90)
    monkeypatch.setattr(pillow_pages, "REDUCED_BEYOND", SIZE[0] * SIZE[1] - 1)
    assert load_image(data).size == (750, 500)
    whole = load_image(data, rules=AS_REFERENCE)
    assert whole.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    assert load_image(saved(colours(), "PNG")).size == SIZE, "only a JPEG is"
    monkeypatch.setattr(pillow_pages, "REDUCED_BEYOND", SIZE[0] * SIZE[1])
    assert load_image(data).size == SIZE


def test_a_reduced_jpeg_is_refused_for_less_than_a_whole_one(
    small_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(colours(), "JPEG")

    def size(picture: Picture) -> tuple[int, int]:
        return picture.size

    monkeypatch.setattr(size, "num_bytes", lambda *_: 0, raising=False)
    make: Any = size
    with pytest.raises(UserError, match="takes 6 MB"):
        next(make_of_pages(make, data))
    monkeypatch.setattr(pillow_pages, "REDUCED_BEYOND", 1000)
    assert next(make_of_pages(make, data)) == (750, 500)


FORMS: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(smooth(), "PNG", compress_level=1),
    "alpha.png": lambda: saved(smooth().convert("RGBA"), "PNG", compress_level=1),
    "grey16.png": lambda: saved(Image.new("I;16", BIG, 700), "PNG"),
    "palette.gif": lambda: saved(smooth().convert("P"), "GIF"),
    "jpg": lambda: saved(smooth(), "JPEG"),
    "cmyk.jpg": lambda: saved(smooth().convert("CMYK"), "JPEG"),
    "progressive.jpg": lambda: saved(smooth(), "JPEG", progressive=True),
    "progressive444.jpg": lambda: saved(smooth(), "JPEG", progressive=True, subsampling=0),
    "turned.jpg": lambda: saved(smooth(), "JPEG", exif=exif(6)),
    "flat.webp": lambda: saved(Image.new("RGB", BIG, "red"), "WEBP", lossless=True, method=0),
    "lossy.webp": lambda: saved(smooth(), "WEBP", method=0),
    "tif": lambda: saved(smooth(), "TIFF"),
    "strip.tif": lambda: saved(
        smooth(), "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: BIG[1]}
    ),
    "turned.tif": lambda: saved(smooth(), "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 8}),
    "bmp": lambda: saved(smooth(), "BMP"),
    "tga": lambda: saved(smooth(), "TGA"),
    "avif": lambda: saved(smooth(), "AVIF", speed=10),
    "jp2": lambda: saved(smooth(), "JPEG2000"),
    "ppm": lambda: saved(smooth(), "PPM"),
    "sgi": lambda: saved(smooth(), "SGI"),
}
BIG = (2000, 1500)
"""Large beside what Pillow and the tiles take anyway."""


@cache
def smooth() -> Image.Image:
    return Image.linear_gradient("L").resize(BIG).convert("RGB")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


MEASURE = """
import sys
from contextlib import contextmanager
from pathlib import Path
from nvlm.inputs import picture, rgb
from nvlm.inputs.images import make_of_pages
from nvlm.inputs.tiling import Tiler

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

class Budget:
    @contextmanager
    def held(self, num_bytes, where):
        self.num_bytes = num_bytes
        yield

def tile(path):
    budget = Budget()
    next(make_of_pages(Tiler(56, 6), path, budget=budget))
    return budget.num_bytes

picture._STRIP_PIXELS = rgb._PART_PIXELS = 1 << 16
for copied in (1 << 24, 0):  # both ways of scaling
    picture._COPIED_PIXELS = copied
    for path in sorted(Path(sys.argv[1]).iterdir()):
        tile(path)  # what is loaded once
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        granted = tile(path)
        print(path.name, peak() - before, granted)
"""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_ordinary_pictures_take_their_pixels_alone(kind: str) -> None:
    image = Image.open(io.BytesIO(saved(colours(), kind)))
    assert decoding_bytes(image) == SIZE[0] * SIZE[1] * (1 if kind == "GIF" else 4)


@pytest.mark.process
def test_reading_takes_no_more_than_the_headers_promise(tmp_path: Path) -> None:
    """The file itself counts where Pillow reads it whole: libwebp and OpenJPEG need it so."""
    for form, data in FORMS.items():
        (tmp_path / f"picture.{form}").write_bytes(data())
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert len(found.splitlines()) == 2 * len(FORMS)
    for line in found.splitlines():
        name, taken, granted = line.split()
        size = (tmp_path / name).stat().st_size
        assert int(taken) <= int(granted) + size + (2 << 20), line


@pytest.mark.usefixtures("small_budget")
def test_every_page_is_granted_for_itself(tmp_path: Path) -> None:
    pages = [colours((400, 300)) for _ in range(6)]
    path = tmp_path / "scan.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    tiler = Tiler(28, 6)
    assert len([*make_of_pages(tiler, path, rules=PictureRules(page="all"), most=6)]) == 6
