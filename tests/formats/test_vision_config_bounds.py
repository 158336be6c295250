"""vision/config.json of a checkpoint or an engine is believed only within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvlm.formats import layout
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.program.errors import UserError

BAD: list[Any] = [None, True, "12", 0, -1, 1.5, [], {}, 10**30, float("nan"), float("inf")]


def changed(checkpoint_dir: Path, folder: Path, section: str, key: str, value: Any) -> Path:
    values = json.loads((checkpoint_dir / layout.VISION / layout.CONFIG).read_text())
    values[section][key] = value
    (folder / layout.CONFIG).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:8])
def test_a_value_that_no_model_has_is_refused(
    checkpoint_dir: Path, tmp_path: Path, value: Any
) -> None:
    found = VisionCheckpoint.read(checkpoint_dir / layout.VISION)
    for section, config in (("vision", found.config), ("tiling", found.tiling)):
        for key in config.__dataclass_fields__:
            if key == "num_dummy_heads" and value == 0 and value is not False:
                continue
            if key.endswith("norm_eps") and value == 1.5 and value is not True:
                continue
            with pytest.raises(UserError, match=key):
                VisionCheckpoint.read(changed(checkpoint_dir, tmp_path, section, key, value))


def test_sizes_that_do_not_belong_together_are_refused(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    for section, key, value in (
        ("vision", "num_attention_heads", 999_983),
        ("vision", "patch_size", 13),
        ("tiling", "image_size", 57),
        ("vision", "colour", 1),
    ):
        with pytest.raises(UserError, match=key if key != "patch_size" else "image_size"):
            VisionCheckpoint.read(changed(checkpoint_dir, tmp_path, section, key, value))
