"""Model directories as others lay them out, and what is given in the place of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import CONVERT, PLAIN, refused, run_command

REVISION = "e5d9b7e2d9b7f5ac3dc4f0f5fd0e9f6ad6f3a1b2"
INDEX = "model.safetensors.index.json"


def unsharded(model_dir: Path, root: Path) -> Path:
    folder = Path(shutil.copytree(model_dir, root / "unsharded"))
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def hub_cache(model_dir: Path, root: Path) -> Path:
    """A repository's folder: blobs, and a snapshot of links to them."""
    folder = root / "models--nvidia--NVLM-D-72B"
    snapshot = folder / "snapshots" / REVISION
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(model_dir.iterdir())):
        shutil.copy(path, folder / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    return folder


def hub_snapshot(model_dir: Path, root: Path) -> Path:
    return hub_cache(model_dir, root) / "snapshots" / REVISION


@pytest.mark.parametrize("lay_out", [unsharded, hub_snapshot])
def test_another_layout_of_the_files_gives_the_same_checkpoint(
    model_dir: Path, tmp_path: Path, lay_out: Callable[[Path, Path], Path]
) -> None:
    weights = []
    for number, folder in enumerate((model_dir, lay_out(model_dir, tmp_path))):
        made = tmp_path / f"checkpoint_{number}"
        result = run_command(CONVERT, "--model_dir", folder, "--output_dir", made, *PLAIN)
        assert result.exit_code == 0, result.stderr
        weights.append((made / "rank0.safetensors").read_bytes())
        assert not any(path.is_symlink() for path in made.rglob("*"))
    assert weights[0] == weights[1]


def adapter(root: Path) -> Path:
    (root / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "nvidia/NVLM-D-72B"})
    )
    save_file({"lora_A": torch.zeros(2)}, root / "adapter_model.safetensors")
    return root


def pickled(root: Path) -> Path:
    for number in (1, 2):
        (root / f"pytorch_model-0000{number}-of-00002.bin").write_bytes(b"PK\x03\x04")
    return root


def gguf(root: Path) -> Path:
    (root / "nvlm-q4.gguf").write_bytes(b"GGUF")
    return root


def nameless_adapter(root: Path) -> Path:
    (root / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return root


OTHERS: dict[str, tuple[Callable[[Path], Path | str], tuple[str, ...]]] = {
    "adapter": (adapter, ("LoRA adapter", "for nvidia/NVLM-D-72B", "merge_and_unload")),
    "nameless_adapter": (nameless_adapter, ("LoRA adapter (adapter_config.json), expected",)),
    "pickled": (pickled, ("pytorch_model-00001-of-00002.bin holds pickled", "safetensors")),
    "gguf": (gguf, ("GGUF file", "llama.cpp", "model*.safetensors")),
    "gguf_file": (lambda root: gguf(root) / "nvlm-q4.gguf", ("GGUF file", "in a folder")),
    "repository": (
        lambda _: "nvidia/NVLM-D-72B",
        ("a repository's name", "hf download nvidia/NVLM-D-72B --local-dir DIR"),
    ),
    "address": (
        lambda _: "https://hub.example/nvidia/NVLM-D-72B",
        ("a repository's name", "hf download nvidia/NVLM-D-72B --local-dir DIR"),
    ),
}


@pytest.mark.parametrize(("make", "fragments"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("dry_run", [(), ("--dry_run",)], ids=["convert", "dry_run"])
def test_what_is_no_model_is_named_for_what_it_is(
    model_dir: Path,
    tmp_path: Path,
    has_config: bool,
    dry_run: tuple[str, ...],
    make: Callable[[Path], Path | str],
    fragments: tuple[str, ...],
) -> None:
    if has_config:
        shutil.copy(model_dir / "config.json", tmp_path)
    where = ("--model_dir", make(tmp_path), "--output_dir", tmp_path / "new")
    refused(tmp_path, CONVERT, *where, *PLAIN, *dry_run, fragments=fragments)


def test_a_folder_of_the_hubs_cache_is_refused_with_its_snapshot(
    model_dir: Path, tmp_path: Path
) -> None:
    folder = hub_cache(model_dir, tmp_path)
    message = ("the hub's cache", f"--model_dir {folder / 'snapshots' / REVISION}")
    where = ("--model_dir", folder, "--output_dir", tmp_path / "new", *PLAIN)
    refused(tmp_path, CONVERT, *where, fragments=message)
    (folder / "refs" / "main").unlink()
    refused(tmp_path, CONVERT, *where, fragments=message)


def test_a_path_that_is_mistyped_is_no_repository(tmp_path: Path) -> None:
    """Its folder is there."""
    (tmp_path / "models").mkdir()
    where = ("--model_dir", tmp_path / "models" / "NVLM", "--output_dir", tmp_path / "new")
    line = refused(tmp_path, CONVERT, *where, *PLAIN, fragments=("is not a directory",))
    assert "repository" not in line
