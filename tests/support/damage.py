"""Damage to model, checkpoint and engine directories, and to the files in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvlm.formats import manifest

Damage = Callable[[Path], None]


def edit_json(path: Path, keys: str, value: Any) -> None:
    """Sets the entry at the dotted `keys`; `...` deletes it."""
    values = json.loads(path.read_text())
    *parents, key = keys.split(".") if keys else [""]
    section = values
    for parent in parents:
        section = section[parent]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    path.write_text(json.dumps(values))


def cut(path: Path, size: int) -> None:
    with open(path, "rb+") as file:
        file.truncate(size)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Applied to a checkpoint or an engine directory, in the same words.
DAMAGES: list[tuple[str, Damage, tuple[str, ...]]] = [
    ("no_manifest", lambda d: (d / "manifest.json").unlink(), ("no manifest.json", "not a fin")),
    ("empty_manifest", lambda d: (d / "manifest.json").write_text(""), ("not valid JSON",)),
    ("half_manifest", lambda d: cut(d / "manifest.json", 300), ("not valid JSON",)),
    ("other_json", lambda d: (d / "manifest.json").write_text("{}"), ("None", "expected")),
    ("a_list", lambda d: (d / "manifest.json").write_text("[]"), ("expected an object",)),
    ("format_2", lambda d: edit_json(d / "manifest.json", "format_version", 2), ("2", "1")),
    ("no_files", lambda d: edit_json(d / "manifest.json", "files", ...), ("manifest.json",)),
    ("empty_files", lambda d: edit_json(d / "manifest.json", "files", {}), ("manifest.json",)),
    ("source_list", lambda d: edit_json(d / "manifest.json", "source", []), ("manifest.json",)),
    ("files_list", lambda d: edit_json(d / "manifest.json", "files", []), ("manifest.json",)),
    (
        "entry_without_size",
        lambda d: edit_json(d / "manifest.json", "files", {"config.json": {"sha256": ""}}),
        ("manifest.json",),
    ),
    (
        "size_as_text",
        lambda d: edit_json(
            d / "manifest.json", "files", {"manifest.json": {"size_bytes": "1", "sha256": ""}}
        ),
        ("manifest.json",),
    ),
    ("no_limits", lambda d: edit_json(d / "manifest.json", "limits", ...), ("manifest.json",)),
    ("more_keys", lambda d: edit_json(d / "manifest.json", "x", 1), ("manifest.json", "'x'")),
    ("no_tokenizer", lambda d: shutil.rmtree(d / "tokenizer"), ("tokenizer", "missing", "again")),
    (
        "changed_tokenizer",
        lambda d: flip_a_byte(d / "tokenizer" / "tokenizer.json"),
        ("tokenizer.json", "changed", "again"),
    ),
    (
        "edited_config",
        lambda d: edit_json(d / "vision" / "config.json", "dtype", "float16"),
        ("config.json", "the manifest says", "again"),
    ),
    (
        "vision_missing",
        lambda d: (d / "vision" / "model.safetensors").unlink(),
        ("model.safetensors", "missing", "again"),
    ),
]


def sealed_again(directory: Path) -> None:
    """A manifest that agrees with the files as they are: the damage came before it."""
    old = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").unlink()
    kept = {key: old[key] for key in ("arguments", "limits", "source")}
    manifest.write_manifest(directory, old["kind"], **kept)
