"""What the manifest says about the files that a source read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nvlm.formats.manifest import sha256_of
from nvlm.inputs.tokenizer import tokenizer_files


def tokenizer_digests(tokenizer_dir: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in tokenizer_files(tokenizer_dir)}


def file_entries(files: Iterable[Path], root: Path) -> dict[str, dict[str, int]]:
    """Sizes and times: the weights themselves take minutes to hash."""
    return {
        str(path.relative_to(root)): {"size_bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        for path in files
        for stat in [path.stat()]
    }
