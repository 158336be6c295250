"""Makes the images of build/conversion/calibration/calibration_data/ and examples/.

In: the photographs in the scikit-image wheel (only CC0 and public domain ones, see LICENSES.md
beside the outputs). Out: small JPEG crops and three drawn documents. Same Pillow, same bytes.
calibration.jsonl and LICENSES.md are written by hand. Usage: python tools/make_calibration_data.py
"""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION_DIR = ROOT / "build" / "conversion" / "calibration" / "calibration_data"
EXAMPLES_DIR = ROOT / "examples"
INK, GREY, WHITE = (28, 32, 40), (150, 156, 166), (255, 255, 255)

# output name -> (file in skimage/data, crop box or None, output size); the long side is at most 640
PHOTOS: dict[str, tuple[str, tuple[int, int, int, int] | None, tuple[int, int]]] = {
    "astronaut.jpg": ("astronaut.png", (70, 0, 410, 510), (340, 510)),
    "camera.jpg": ("camera.png", None, (448, 448)),
    "chelsea.jpg": ("chelsea.png", None, (451, 300)),
    "coffee.jpg": ("coffee.png", None, (600, 400)),
    "hubble.jpg": ("hubble_deep_field.jpg", (0, 340, 1000, 540), (640, 128)),
    "retina.jpg": ("retina.jpg", None, (384, 384)),
    "rocket.jpg": ("rocket.jpg", (240, 0, 400, 427), (160, 427)),
    "text.jpg": ("text.png", None, (448, 172)),
}
SALES = [("North", 48), ("South", 31), ("East", 75), ("West", 62), ("Online", 96)]
RECEIPT = [("2 Espresso", 5.6), ("1 Croissant", 2.9), ("1 Orange juice", 4.2), ("3 Postcard", 3.75)]
TABLE = [
    ("Station", "Height (m)", "Jan (mm)", "Jul (mm)", "Year (mm)"),
    ("Harbour", "4", "82", "55", "934"),
    ("Old mill", "118", "97", "71", "1,120"),
    ("Ridge", "1,042", "141", "128", "1,806"),
    ("Lakeside", "433", "76", "102", "1,015"),
]


def font(size: int) -> ImageFont.FreeTypeFont:
    chosen = ImageFont.load_default(size)
    assert isinstance(chosen, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return chosen


def bar_chart() -> Image.Image:
    image = Image.new("RGB", (640, 420), WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((320, 26), "Units sold in 2023 (thousands)", INK, font(22), anchor="mm")
    for value in range(0, 101, 20):
        y = 360 - 3 * value
        draw.line((70, y, 610, y), fill=GREY if value else INK)
        draw.text((60, y), str(value), INK, font(15), anchor="rm")
    colours = [(66, 109, 169), (214, 126, 44), (84, 150, 91), (188, 64, 66), (131, 105, 168)]
    for index, ((name, value), colour) in enumerate(zip(SALES, colours, strict=True)):
        x = 95 + 104 * index
        draw.rectangle((x, 360 - 3 * value, x + 64, 359), fill=colour)
        draw.text((x + 32, 348 - 3 * value), str(value), INK, font(15), anchor="mm")
        draw.text((x + 32, 380), name, INK, font(17), anchor="mm")
    return image


def receipt() -> Image.Image:
    image = Image.new("RGB", (320, 560), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    draw.text((160, 40), "CAFE AT THE PIER", INK, font(24), anchor="mm")
    draw.text((160, 72), "12 Harbour Road", INK, font(15), anchor="mm")
    draw.text((160, 96), "14 March 2024   09:41", INK, font(15), anchor="mm")
    rows = [*RECEIPT, ("Subtotal", sum(price for _, price in RECEIPT))]
    rows += [("VAT 10%", round(rows[-1][1] * 0.1, 2))]
    rows += [("TOTAL", rows[-2][1] + rows[-1][1])]
    for index, (name, price) in enumerate(rows):
        y = 150 + 42 * index + (18 if index >= len(RECEIPT) else 0)
        size = 22 if name == "TOTAL" else 17
        draw.text((28, y), name, INK, font(size), anchor="lm")
        draw.text((292, y), f"{price:.2f}", INK, font(size), anchor="rm")
    for y in (122, 312):
        draw.line((24, y, 296, y), fill=GREY, width=2)
    for index, width in enumerate((2, 1, 3, 1, 1, 2, 4, 1, 2, 1, 3, 3, 1, 2, 1, 4, 1, 1, 2, 3)):
        draw.rectangle((62 + 10 * index, 470, 61 + 10 * index + 2 * width, 515), fill=INK)
    draw.text((160, 536), "Thank you, see you soon!", INK, font(14), anchor="mm")
    return image


def table() -> Image.Image:
    image = Image.new("RGB", (600, 220), WHITE)
    draw = ImageDraw.Draw(image)
    for row, cells in enumerate(TABLE):
        fill = (222, 230, 242) if row == 0 else ((246, 247, 250) if row % 2 else WHITE)
        draw.rectangle((10, 10 + 40 * row, 589, 49 + 40 * row), fill=fill, outline=GREY)
        for column, cell in enumerate(cells):
            x = 22 if column == 0 else 118 * column + 104
            draw.text((x, 30 + 40 * row), cell, INK, font(17), anchor="lm" if column == 0 else "rm")
    return image


def main() -> None:
    spec = find_spec("skimage")
    assert spec is not None, "pip install scikit-image"
    assert spec.origin is not None
    source_dir = Path(spec.origin).parent / "data"
    CALIBRATION_DIR.mkdir(parents=True, exist_ok=True)
    EXAMPLES_DIR.mkdir(parents=True, exist_ok=True)
    for name, (source, box, size) in PHOTOS.items():
        photo = Image.open(source_dir / source).resize(size, Image.Resampling.LANCZOS, box=box)
        photo.save(CALIBRATION_DIR / name, quality=85, optimize=True)
    for draw_image in (bar_chart, receipt, table):
        drawn = draw_image().quantize(64, dither=Image.Dither.NONE)
        drawn.save(CALIBRATION_DIR / f"{draw_image.__name__}.png", optimize=True)
    demo = Image.open(source_dir / "coffee.png")
    demo.save(EXAMPLES_DIR / "coffee.jpg", quality=92, optimize=True)


if __name__ == "__main__":
    main()
