"""Makes tests/data/images/, tiling_goldens.json and grid_goldens.json.

An independent calculation: imports nothing of the product. The grid is chosen with exact fractions,
the pixels come from Pillow. The rules are those of the reference (NVLM-D README and Megatron-LM
image_processing.py), the semantics of odd inputs are SEMANTICS below. tests/data/README.md explains
the files. Usage: python tests/data/make_tiling_goldens.py [--keep_images]
"""

import argparse
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from math import isqrt
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps, features

HERE = Path(__file__).resolve().parent
IMAGES_DIR = HERE / "images"
TILE = 448
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
ORIENTATION = 0x0112  # EXIF tag
SEMANTICS = {
    "order": "first frame, EXIF transpose (where exif is true), 16 to 8 bit, RGB, resize, crop",
    "animation": "first frame",
    "exif": "PIL.ImageOps.exif_transpose, before every conversion; false ignores the orientation",
    "16_bit": "modes I;16*: round(value / 257) = (value + 128) // 257; 257 is odd: no ties. 16-bit "
    "RGB, RGBA and LA PNGs never get here: Pillow keeps their high byte when it decodes them",
    "alpha": "dropped by Image.convert('RGB'): RGBA, LA and palette transparency keep the colour "
    "stored under transparent pixels; nothing is composited onto a background",
    "tiles": "uint8 [num_tiles, 448, 448, 3] RGB: columns*rows boxes row-major, then the thumbnail "
    "(the whole image resized to 448x448) unless the grid is 1x1; num_tiles counts the thumbnail",
    "resize": "PIL.Image.resize(size, BICUBIC) of the whole RGB image, aspect ratio ignored",
    "sha256": "of tiles.tobytes(); holds for the pillow and libjpeg_turbo versions given here",
    "means": "per tile and channel, of (tiles / 255 - mean) / std; stds: population (ddof 0)",
}

Grid = tuple[int, int]  # columns, rows


# ------------------------------------------------------------------------------------ the reference


def target_ratios(max_num_tiles: int) -> list[Grid]:
    sides = range(1, max_num_tiles + 1)
    pairs = [(i, j) for i in sides for j in sides if i * j <= max_num_tiles]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))


def choose(distances: list[tuple[Grid, Fraction | float]], area: int) -> Grid:
    chosen, best = distances[0]
    for grid, distance in distances[1:]:
        tie_goes_to_later = 2 * area > TILE * TILE * grid[0] * grid[1]
        if distance < best or (distance == best and tie_goes_to_later):
            chosen, best = grid, distance
    return chosen


def exact_grid(width: int, height: int, max_num_tiles: int) -> Grid:
    aspect, ratios = Fraction(width, height), target_ratios(max_num_tiles)
    return choose([(grid, abs(aspect - Fraction(*grid))) for grid in ratios], width * height)


def float_grid(width: int, height: int, max_num_tiles: int) -> Grid:
    """The same with the reference's float64 arithmetic, which splits some exact ties."""
    aspect, ratios = width / height, target_ratios(max_num_tiles)
    return choose([(grid, abs(aspect - grid[0] / grid[1])) for grid in ratios], width * height)


def load_rgb(path: Path, exif: bool) -> Image.Image:
    image: Image.Image = Image.open(path)
    image.seek(0)
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def cut_tiles(image: Image.Image, grid: Grid) -> NDArray[np.uint8]:
    columns, rows = grid
    whole = image.resize((TILE * columns, TILE * rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(whole).reshape(rows, TILE, columns, TILE, 3)
    tiles = pixels.transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 3)
    if len(tiles) > 1:
        thumbnail = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, thumbnail[None]])
    return np.ascontiguousarray(tiles)


# ------------------------------------------------------------------------------------------- images


def scene(width: int, height: int) -> Image.Image:
    """Ramps that differ per channel, shapes that break every symmetry, one fine grating."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1)
    image = Image.fromarray(np.stack([red, green, 255 - (red + green) // 2], -1).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        return int(x0 * width), int(y0 * height), int(x1 * width), int(y1 * height)

    draw.ellipse(box(0.06, 0.08, 0.34, 0.42), fill=(250, 240, 30))
    draw.rectangle(box(0.62, 0.10, 0.90, 0.30), fill=(20, 30, 120), outline=(255, 255, 255))
    draw.line(box(0.05, 0.95, 0.95, 0.45), fill=(200, 20, 60), width=3)
    for index in range(0, int(0.3 * width), 3):  # aliases unless the resize is antialiased
        column = int(0.1 * width) + index
        draw.line((column, int(0.55 * height), column, int(0.75 * height)), fill=(0, 0, 0))
    return image


def ramp(width: int, height: int, diagonal: bool = False) -> NDArray[np.int64]:
    """[height, width] from 0 to 255, left to right or corner to corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.asarray(255 * (x + y) // (width + height - 2) if diagonal else 255 * x // (width - 1))


def strip(width: int, height: int) -> Image.Image:
    values = np.arange(width * height)
    rgb = np.stack([values * 255 // values[-1], values // 20 % 256, 255 * (values // 500 % 2)], -1)
    return Image.fromarray(rgb.reshape(height, width, 3).astype(np.uint8))


def rgba() -> Image.Image:
    """Transparent on the left and in the ellipse, where strong colours lie underneath."""
    image = scene(500, 320)
    image.putalpha(Image.fromarray(ramp(500, 320).astype(np.uint8)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((200, 60, 460, 280), fill=(255, 0, 200, 0))
    return image


def grey_alpha() -> Image.Image:
    values = np.stack([ramp(300, 450, diagonal=True), 255 - ramp(300, 450)], -1).astype(np.uint8)
    image = Image.fromarray(values)
    assert image.mode == "LA"
    return image


def palette() -> Image.Image:
    image = Image.fromarray((ramp(360, 480, diagonal=True) // 16).astype(np.uint8), "P")
    image.putpalette([c for i in range(16) for c in (255 - 16 * i, 37 * i % 256, 90 * i % 256)])
    ImageDraw.Draw(image).rectangle((40, 300, 220, 440), fill=5)
    return image


def one_bit() -> Image.Image:
    image = Image.new("1", (640, 200), 1)
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 20, 190, 180), fill=0)
    for index in range(0, 400, 5):
        draw.line((220 + index, 20, 220 + index, 20 + index * 160 // 400), fill=0)
    return image


def grey_16_bit() -> NDArray[np.uint16]:
    """[350, 420]: the whole range, with low bytes that distinguish rounding from truncation."""
    y, x = np.mgrid[0:350, 0:420]
    values = x * 156 + y // 7 * 3
    values[40:160, 40:200] = 65535 - 385 * (x[40:160, 40:200] // 8)
    return np.asarray(values, np.uint16)


def rgb_16_bit_png() -> bytes:
    """Pillow cannot write this. Samples are multiples of 257, so that v // 256 == v / 257."""
    samples = np.asarray(scene(300, 220)).astype(">u2") * 257

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 300, 220, 16, 2, 0, 0, 0)
    flat = samples.view(np.uint8).reshape(220, -1)
    differences = np.diff(flat, axis=0, prepend=np.zeros_like(flat[:1]))  # PNG filter 2: Up
    rows = b"".join(b"\2" + row.tobytes() for row in differences)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def write_images() -> None:
    IMAGES_DIR.mkdir(exist_ok=True)
    for name, size in RGB_SIZES.items():
        scene(*size).save(IMAGES_DIR / name, optimize=True)
    strip(5000, 1).save(IMAGES_DIR / "strip_5000x1.png", optimize=True)
    strip(1, 5000).save(IMAGES_DIR / "strip_1x5000.png", optimize=True)
    Image.new("RGB", (1, 1), (200, 100, 50)).save(IMAGES_DIR / "pixel_1x1.png")
    scene(640, 480).save(IMAGES_DIR / "rgb.jpg", quality=85)
    scene(480, 300).convert("L").save(IMAGES_DIR / "grey.png", optimize=True)
    scene(400, 300).convert("CMYK").save(IMAGES_DIR / "cmyk.jpg", quality=80)
    for value in (3, 6):
        path = IMAGES_DIR / f"exif_orientation_{value}.jpg"
        scene(520, 260).save(path, quality=85, exif=orientation(value))
    scene(300, 450).save(IMAGES_DIR / "exif_orientation_8.png", optimize=True, exif=orientation(8))
    rgba().save(IMAGES_DIR / "rgba.png", optimize=True)
    grey_alpha().save(IMAGES_DIR / "grey_alpha.png", optimize=True)
    palette().save(IMAGES_DIR / "palette_opaque.png", optimize=True)
    transparency = bytes(0 if i % 3 == 0 else 255 - 10 * i for i in range(16))
    palette().save(IMAGES_DIR / "palette_alpha.png", optimize=True, transparency=transparency)
    one_bit().save(IMAGES_DIR / "one_bit.png", optimize=True)
    grey_16 = Image.fromarray(grey_16_bit())
    grey_16.save(IMAGES_DIR / "grey_16_bit.png", optimize=True)
    part = grey_16_bit()[:100, :120].astype(">u2")
    big_endian = Image.frombytes("I;16B", (120, 100), part.tobytes())
    big_endian.save(IMAGES_DIR / "grey_16_bit_big_endian.tif")
    (IMAGES_DIR / "rgb_16_bit.png").write_bytes(rgb_16_bit_png())
    first, second = palette(), palette().transpose(Image.Transpose.ROTATE_180)
    first.save(IMAGES_DIR / "animated.gif", save_all=True, append_images=[second], duration=200)


RGB_SIZES: dict[str, tuple[int, int]] = {
    "landscape_800x450.png": (800, 450),
    "portrait_400x1000.png": (400, 1000),
    "panorama_1500x300.png": (1500, 300),
    "square_448x448.png": (448, 448),  # one tile, no resize, no thumbnail
    "square_700x700.png": (700, 700),  # 2x2
    "square_1000x1000.png": (1000, 1000),  # 2x2 of 6, 3x3 of 12
    "tie_633x634.png": (633, 634),  # area 401,322, not above 401,408: 1x1
    "tie_634x633.png": (634, 633),
    "tie_634x634.png": (634, 634),  # area 401,956: 2x2
    "tie_896x1008.png": (896, 1008),  # area 903,168 = 0.5 * 448**2 * 9: 2x2 and not 3x3
    "midpoint_600x480.png": (600, 480),  # 1.25 is midway between 1:1 and 3:2; small area: 1x1
    "midpoint_1000x800.png": (1000, 800),  # the same, large area: 3x2
}


def tiling_goldens() -> Iterator[dict[str, object]]:
    for path in sorted(IMAGES_DIR.iterdir()):
        oriented = Image.open(path).getexif().get(ORIENTATION, 1) != 1
        for exif in (True, False) if oriented else (True,):
            image = load_rgb(path, exif)
            for max_num_tiles in (6, 12):
                grid = exact_grid(*image.size, max_num_tiles)
                assert grid == float_grid(*image.size, max_num_tiles), path
                tiles = cut_tiles(image, grid)
                normalised = (tiles / 255.0 - MEAN) / STD
                yield {
                    "file": path.name,
                    "mode": Image.open(path).mode,
                    "size": list(image.size),
                    "max_num_tiles": max_num_tiles,
                    "exif": exif,
                    "grid": list(grid),
                    "num_tiles": len(tiles),
                    "sha256": hashlib.sha256(tiles.tobytes()).hexdigest(),
                    "means": normalised.mean((1, 2)).round(5).tolist(),
                    "stds": normalised.std((1, 2)).round(5).tolist(),
                }


# -------------------------------------------------------------------------------------------- grids


def ratio_sizes(max_num_tiles: int) -> Iterator[tuple[int, int, str]]:
    """Every grid's own ratio, small (the earlier of two equal wins) and large (the later)."""
    for columns, rows in target_ratios(max_num_tiles):
        for scale in (50, 448):
            yield columns * scale, rows * scale, f"{columns}:{rows}"
        yield columns * 448 + 1, rows * 448, f"just above {columns}:{rows}"


def duplicate_sizes(max_num_tiles: int) -> Iterator[tuple[int, int, str]]:
    """Where one ratio has two grids: areas next to, and where integers allow it at, the switch."""
    ratios = target_ratios(max_num_tiles)
    for grid in ratios:
        smaller = [r for r in ratios if r[0] * grid[1] == r[1] * grid[0] and r < grid]
        if not smaller:
            continue
        threshold = TILE * TILE * grid[0] * grid[1] // 2
        side = {"equal": 0, "below": -1, "above": 1}
        for word, step in side.items():
            for area in range(threshold + step, threshold + 400 * step + 1, step or 1):
                found = pairs_of_ratio(area, Fraction(*grid), max_num_tiles)
                for width, height in found:
                    yield width, height, f"{word} {threshold}: {smaller[-1]} or {grid}"
                if found:
                    break


def pairs_of_ratio(area: int, ratio: Fraction, max_num_tiles: int) -> list[tuple[int, int]]:
    divisors = [d for d in range(1, isqrt(area) + 1) if area % d == 0]
    pairs = [(d, area // d) for d in divisors] + [(area // d, d) for d in divisors]
    return [p for p in pairs if Fraction(*exact_grid(*p, max_num_tiles)) == ratio]


def midpoint_sizes(max_num_tiles: int) -> Iterator[tuple[int, int, str]]:
    """Midway between neighbours, below and above the area that decides, and one pixel beside."""
    ratios = target_ratios(max_num_tiles)
    values = sorted({Fraction(*grid) for grid in ratios})
    for low, high in pairwise(values):
        middle = (low + high) / 2
        tied = [grid for grid in ratios if Fraction(*grid) in (low, high)]
        threshold = TILE * TILE * max(i * j for i, j in tied) // 2
        scale = isqrt(threshold // (middle.numerator * middle.denominator))
        for k in (max(scale, 1), scale + 1):
            width, height = k * middle.numerator, k * middle.denominator
            yield width, height, f"midway between {low} and {high}"
            yield width + 1, height, f"beside {low} and {high}"


EXACT_401408 = [(448, 896), (896, 448), (512, 784), (784, 512), (392, 1024), (1024, 392)]
OTHER_SIZES = [
    *((633, 633), (633, 634), (634, 633), (634, 634), (1, 1), (448, 448), (5000, 1), (1, 5000)),
    *((65000, 1), (1, 65000), (20000, 30), (30, 20000), (640, 480), (480, 640), (1024, 768)),
    *((1280, 720), (1920, 1080), (1080, 1920), (3840, 2160), (4032, 3024), (3024, 4032)),
    *((2480, 3508), (3508, 2480), (1170, 2532), (1654, 2339), (1000, 1000), (3000, 3000), (7, 5)),
]


def grid_goldens() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(entries where exact and float arithmetic agree, the midpoints where they do not)."""
    agreed: dict[tuple[int, int, int], dict[str, object]] = {}
    split: dict[tuple[int, int, int], dict[str, object]] = {}
    for limit in (1, 6, 12):
        sizes = [(w, h, "area exactly 401408") for w, h in EXACT_401408]
        sizes += [(w, h, "ordinary or extreme") for w, h in OTHER_SIZES]
        if limit > 1:
            sizes += [*duplicate_sizes(limit), *midpoint_sizes(limit), *ratio_sizes(limit)]
        for width, height, why in sizes:
            exact, inexact = exact_grid(width, height, limit), float_grid(width, height, limit)
            row: dict[str, object] = {"width": width, "height": height, "max_num_tiles": limit}
            if exact == inexact:
                row |= {"columns": exact[0], "rows": exact[1], "why": why}
                agreed.setdefault((width, height, limit), row)
            else:
                row |= {"float64": list(inexact), "exact": list(exact), "why": why}
                split.setdefault((width, height, limit), row)
    for limit, count in ((6, 14), (12, 35)):
        rows = [row for row in agreed.values() if row["max_num_tiles"] == limit]
        winners = {(row["columns"], row["rows"]) for row in rows}
        assert winners == set(target_ratios(limit))
        assert len(winners) == count
    return list(agreed.values()), list(split.values())


def write_json(
    path: Path, head: dict[str, object], tables: dict[str, list[dict[str, object]]]
) -> None:
    """One row a line, so that a diff shows which golden changed."""
    dump: Callable[[object], str] = json.dumps
    parts = [f"{dump(key)}: {dump(value)}" for key, value in head.items()]
    for key, rows in tables.items():
        parts.append(f"{dump(key)}: [\n" + ",\n".join(dump(row) for row in rows) + "\n]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep_images", action="store_true", help="only recompute the goldens")
    if not parser.parse_args().keep_images:
        write_images()
    versions = {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "numpy": np.__version__,
    }
    head: dict[str, object] = {"versions": versions, "tile_size": TILE, "semantics": SEMANTICS}
    write_json(HERE / "tiling_goldens.json", head, {"goldens": list(tiling_goldens())})
    agreed, split = grid_goldens()
    write_json(
        HERE / "grid_goldens.json", {"tile_size": TILE}, {"goldens": agreed, "float_decides": split}
    )


if __name__ == "__main__":
    main()
