"""What a manifest and a checkpoint's config.json say is refused in a sentence, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.manifest import read_manifest
from nvlm.program.errors import UserError


@pytest.mark.parametrize("kind", [[], {}, None, 3, "x", ["engine"]])
def test_a_kind_of_any_type_is_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / layout.MANIFEST).write_text(json.dumps({"kind": kind, "format_version": 1}))
    with pytest.raises(UserError, match="is of kind"):
        read_manifest(tmp_path, "engine")


def test_heads_that_do_not_divide_the_width_are_refused(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / layout.CONFIG
    values = json.loads(path.read_text())
    with pytest.raises(UserError, match=r"hidden_size is .*, expected a multiple"):
        CheckpointConfig.from_json({**values, "hidden_size": values["hidden_size"] - 1}, path)


@pytest.mark.parametrize("value", [1 << 63, 10**30, 10**400])
def test_numbers_that_no_model_has_are_refused(checkpoint_dir: Path, value: int) -> None:
    path = checkpoint_dir / layout.CONFIG
    values = json.loads(path.read_text())
    for key in ("vocab_size", "max_position_embeddings", "rotary_base", "norm_epsilon"):
        with pytest.raises(UserError, match=rf"{key} is .{{1,220}}, expected a positive"):
            CheckpointConfig.from_json({**values, key: value}, path)
