"""Photographs of a camera's size, each of its own: nothing can be found in a cache."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageEnhance

PHOTO = Path(__file__).parents[1] / "examples" / "coffee.jpg"
SIZES = ((1600, 1200), (1024, 683), (1200, 1600), (800, 800))


def write_photos(folder: Path, number: int) -> list[Path]:
    """One picture in different brightness, as JPEG files of four shapes."""
    photo = Image.open(PHOTO).convert("RGB")
    paths = []
    for index in range(number):
        brightness = 0.6 + 0.8 * index / number
        image = ImageEnhance.Brightness(photo.resize(SIZES[index % len(SIZES)])).enhance(brightness)
        paths.append(folder / f"{index}.jpg")
        image.save(paths[-1], quality=90)
    return paths
