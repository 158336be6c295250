"""What people give as --model_dir that is no model, each named for what it is.

Out: a `UserError`, or nothing. Whether a model is NVLM-D, and whole, its source finds out.
"""

from __future__ import annotations

import re
from pathlib import Path

from nvlm.formats import layout
from nvlm.formats.manifest import is_ours
from nvlm.program.errors import UserError
from nvlm.program.json_files import read_json_object

_ADAPTER = "adapter_config.json"
# A repository's name, alone or after the hub's address, of which Path keeps one slash.
_REPOSITORY = re.compile(r"(?:[a-z]+:/+(?:[^/]+/)?)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pth", "*.pt")


def check_model_dir(model_dir: Path) -> None:
    """Raises `UserError` for a folder or name that holds no model as published."""
    if not model_dir.is_dir():
        raise _not_a_folder(model_dir)
    if is_ours(model_dir, "checkpoint"):
        raise UserError(
            f"{model_dir} is a checkpoint directory already, expected the published model; build "
            f"an engine with build_engine.py --checkpoint_dir {model_dir}, or give what it was "
            "made from as --model_dir"
        )
    if is_ours(model_dir, "engine"):
        raise UserError(
            f"{model_dir} is an engine directory, expected the published model; ask it with run.py "
            f"--engine_dir {model_dir}, or give NVLM-D's folder as --model_dir"
        )
    if is_ours(model_dir, "export"):
        raise UserError(
            f"{model_dir} is an export for other engines, quantised already, expected the "
            "published model; give what it was made from as --model_dir"
        )
    if quantised := _quantised_by(model_dir):
        raise UserError(
            f"{model_dir} is quantised already, by {quantised}, expected the published model; give "
            "the unquantised checkpoint as --model_dir"
        )
    if (model_dir / _ADAPTER).is_file():
        base = read_json_object(model_dir / _ADAPTER).get("base_model_name_or_path")
        of = f", for {base}" if base else ""
        raise UserError(
            f"{model_dir} holds a LoRA adapter ({_ADAPTER}{of}), expected a whole model; "
            "merge it with peft (merge_and_unload, then save_pretrained) and give that folder as "
            "--model_dir"
        )
    if snapshot := _snapshot(model_dir):
        raise UserError(
            f"{model_dir} is a repository's folder in the hub's cache, expected one snapshot of "
            f"it; use --model_dir {snapshot}"
        )
    if any(model_dir.glob(layout.ANY_WEIGHTS)):
        return
    if gguf := _first(model_dir, "*.gguf"):
        raise _gguf(gguf)
    if pickle := next(filter(None, (_first(model_dir, name) for name in _PICKLES)), None):
        raise UserError(
            f"{pickle} holds pickled weights, expected {layout.SHARDS}; download those, or load "
            "the model with transformers and save it with save_pretrained"
        )


def _quantised_by(model_dir: Path) -> str | None:
    """The method that config.json names, for whichever model."""
    path = model_dir / layout.CONFIG
    if not path.is_file():
        return None
    quantization = read_json_object(path).get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else "an unnamed method"


def _not_a_folder(model_dir: Path) -> UserError:
    if model_dir.suffix == ".gguf" and model_dir.is_file():
        return _gguf(model_dir)
    if model_dir.is_file():
        return UserError(f"--model_dir {model_dir} is not a directory; give the folder it is in")
    repository = _REPOSITORY.fullmatch(str(model_dir))
    if repository and not model_dir.parent.is_dir():
        return UserError(
            f"--model_dir {model_dir} is not a directory but a repository's name, and nothing is "
            f"downloaded here; run: hf download {repository[1]} --local-dir DIR, and give "
            "--model_dir DIR"
        )
    return UserError(f"--model_dir {model_dir} is not a directory; give NVLM-D's folder")


def _gguf(path: Path) -> UserError:
    return UserError(
        f"{path} is a GGUF file, for llama.cpp; expected the published {layout.SHARDS} in a folder"
    )


def _snapshot(model_dir: Path) -> Path | None:
    """The snapshot that a folder of the hub's cache has as `main`, else its latest."""
    snapshots = model_dir / "snapshots"
    if (model_dir / layout.CONFIG).exists() or not (model_dir / "blobs").is_dir():
        return None
    main = model_dir / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text().strip()).is_dir():
        return named
    return max(snapshots.glob("*/"), key=lambda path: path.stat().st_mtime, default=None)


def _first(folder: Path, pattern: str) -> Path | None:
    return min(folder.glob(pattern), default=None)
