"""Which fonts draw what. fonts.json lists families of the Fontsource collection with versions.

Training and validation fonts are fetched by the command in docs/tiny_model.md; the evaluation's
are in the folder fonts/, with their licences, and occur nowhere else.
"""

from __future__ import annotations

import json
from pathlib import Path

_LIST = Path(__file__).with_name("fonts.json")
EVALUATION_FONTS = Path(__file__).with_name("fonts")


def training_font_files(fonts_dir: Path) -> list[Path]:
    return _files(fonts_dir, "training")


def validation_font_files(fonts_dir: Path) -> list[Path]:
    return _files(fonts_dir, "validation")


def evaluation_font_files() -> list[Path]:
    return sorted(EVALUATION_FONTS.glob("*.woff2"))


def _files(fonts_dir: Path, use: str) -> list[Path]:
    families = json.loads(_LIST.read_text())[use]
    found = [path for name in families for path in sorted(fonts_dir.glob(f"{name}-latin-*.woff2"))]
    assert found, f"{fonts_dir} has none of the {use} fonts"
    return found
