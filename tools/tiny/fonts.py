"""Which fonts draw what. fonts.json lists families of the Fontsource collection with versions.

Training and validation fonts are fetched by the command in docs/tiny_model.md; the evaluation's
are in the folder fonts/, with their licences, and occur nowhere else.
"""

from __future__ import annotations

import json
from pathlib import Path

from nvlm.program.errors import UserError

_LIST = Path(__file__).with_name("fonts.json")
EVALUATION_FONTS = Path(__file__).with_name("fonts")


def training_font_files(fonts_dir: Path) -> list[Path]:
    return _files(fonts_dir, "training")


def validation_font_files(fonts_dir: Path) -> list[Path]:
    return _files(fonts_dir, "validation")


def evaluation_font_files() -> list[Path]:
    return sorted(EVALUATION_FONTS.glob("*.woff2"))


def _files(fonts_dir: Path, use: str) -> list[Path]:
    """Raises `UserError` where a family is missing: fewer fonts would train another model."""
    families = json.loads(_LIST.read_text())[use]
    found = {name: sorted(fonts_dir.glob(f"{name}-latin-*.woff2")) for name in families}
    if missing := [name for name, files in found.items() if not files]:
        raise UserError(
            f"{fonts_dir} is missing {len(missing)} of the {len(families)} {use} families, "
            f"{missing[0]} for one; docs/tiny_model.md says how to fetch them"
        )
    return [path for files in found.values() for path in files]
