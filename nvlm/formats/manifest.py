"""manifest.json: what makes a checkpoint or engine directory a finished one.

Written last. A directory without it is unfinished and is refused. It names what made the
directory, its limits, and every file's size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from tqdm import tqdm

from nvlm import __version__
from nvlm.formats.code_digest import code_digest
from nvlm.formats.layout import (
    CONFIG,
    MANIFEST,
    MEGATRON_TRACKER,
    REPORT_PAGE,
    SHARDS,
    WEIGHTS_INDEX,
)
from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import read_json_object, write_json_atomically

FORMAT_VERSION = 1
Kind = Literal["checkpoint", "engine", "export"]

_TAKES_A_MODEL = {
    "checkpoint": "convert_checkpoint.py --model_dir {}",
    "engine": "convert_checkpoint.py --model_dir {} and build_engine.py",
}
_MADE_BY = {
    "checkpoint": "convert_checkpoint.py --output_dir {}",
    "engine": "build_engine.py --engine_dir {}",
    "export": "convert_checkpoint.py --output_format --output_dir {}",
}
_HUGGING_FACE = (WEIGHTS_INDEX, SHARDS)
_MEGATRON = (MEGATRON_TRACKER, "mp_rank_*/", "*/mp_rank_*/")
_HASH_CHUNK_BYTES = 4 << 20
_SMALL_FILE_BYTES = 16 << 20  # files up to this size are hashed at every load


def with_article(kind: Kind) -> str:
    """The kind with its article."""
    return f"a {kind}" if kind == "checkpoint" else f"an {kind}"


@dataclass(frozen=True, slots=True)
class FileEntry:
    size_bytes: int  # of the whole file
    sha256: str  # hexadecimal


@dataclass(frozen=True, slots=True)
class Manifest:
    kind: Kind  # what the directory is: checkpoint, engine or export
    arguments: dict[str, Any]  # flags of the command that made it, by name
    limits: dict[str, int]  # an engine's `EngineLimits`; empty for others
    source: dict[str, Any]  # what it was made from: digests, and choices by name
    files: dict[str, FileEntry]  # by path, relative to the directory
    versions: dict[str, str] = field(default_factory=dict)  # packages that took part in making it
    format_version: int = FORMAT_VERSION  # of the manifest itself

    @property
    def digest(self) -> str:
        """SHA-256 over all file entries but the report's page, which names the day: changes when
        any other file changes."""
        lines = [
            f"{name} {entry.sha256}"
            for name, entry in sorted(self.files.items())
            if name != REPORT_PAGE
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256_of(path: Path, progress: tqdm[NoReturn] | None = None) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest would not show progress
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress.update(len(chunk))
    return digest.hexdigest()


def write_manifest(
    directory: Path,
    kind: Kind,
    *,
    arguments: dict[str, Any],
    limits: dict[str, int],
    source: dict[str, Any],
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Writes the manifest of what is below `directory`, atomically.

    Every file is hashed but those in `known` (by relative path): files carried over from a
    directory with a manifest keep the entries that they had there, so damage since then shows.
    """
    entries = dict(known or {})
    paths = {
        str(path.relative_to(directory)): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    total = sum(size for name, size in sizes.items() if name not in entries)
    with tqdm(total=total, desc="hashing files", unit="B", unit_scale=True) as progress:
        for name, path in paths.items():
            if name not in entries:
                entries[name] = FileEntry(sizes[name], sha256_of(path, progress))
    files = {name: entries[name] for name in paths}
    versions = {
        "nvlm": __version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    manifest = Manifest(kind, arguments, limits, source, files, versions)
    write_json_atomically(directory / MANIFEST, asdict(manifest))
    return manifest


def read_manifest(directory: Path, kind: Kind) -> Manifest:
    """The manifest of a finished directory whose files are all there.

    Every file's size is checked and small files are hashed; `verify_all` hashes the rest.
    """
    path = directory / MANIFEST
    command = _MADE_BY[kind].format(directory)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {what}; give what {command} made")
    program, flag, _ = command.split(maxsplit=2)
    # Nothing here says who made it, so nothing is said of deleting it.
    fix = f"make one in a new directory with {program} {flag}"
    if not path.is_file():
        if _looks_like_model(directory):
            raise UserError(
                f"{directory} is a model as published, not {with_article(kind)} directory; "
                f"make one of it with {_TAKES_A_MODEL[kind].format(directory)}"
            )
        raise UserError(
            f"{directory} has no {MANIFEST}, so it is not a finished {kind} directory; {fix}"
        )
    try:
        values = read_json_object(path)
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    found = values.get("kind"), values.get("format_version")
    if isinstance(found[0], str) and found[0] in _MADE_BY and found[0] != kind:
        raise UserError(
            f"{path} is of kind {shown(found[0])}, expected kind {shown(kind)}; give the directory "
            f"that {program} made"
        )
    if found != (kind, FORMAT_VERSION):
        raise UserError(
            f"{path} is of kind {shown(found[0])} and format {shown(found[1])}, expected kind "
            f"{kind!r} and format {FORMAT_VERSION}; {fix}"
        )
    try:
        manifest = _parse(values)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({shown(error)}); {fix}") from None
    for name, entry in manifest.files.items():
        _check_file(directory / name, entry, entry.size_bytes <= _SMALL_FILE_BYTES, command)
    return manifest


def _looks_like_model(directory: Path) -> bool:
    """Whether it holds weights as published, in either layout, whole or not."""
    patterns = (*_MEGATRON, *(_HUGGING_FACE if (directory / CONFIG).is_file() else ()))
    return any(any(directory.glob(pattern)) for pattern in patterns)


def _parse(values: dict[str, Any]) -> Manifest:
    """Raises `TypeError`, `KeyError` or `AttributeError` for what no version of ours wrote."""
    files = {name: FileEntry(**entry) for name, entry in values["files"].items()}
    if not files or not all(isinstance(values[key], dict) for key in ("source", "limits")):
        raise TypeError("files, source and limits are objects, files not an empty one")
    for entry in files.values():
        if not isinstance(entry.size_bytes, int) or not isinstance(entry.sha256, str):
            raise TypeError(f"{entry} is no file entry")
    return Manifest(**{**values, "files": files})


def is_ours(directory: Path, kind: Kind) -> bool:
    """Whether a directory has a manifest of this kind, of any version; files are not checked."""
    try:
        values = read_json_object(directory / MANIFEST)
    except UserError:
        return False
    return values.get("kind") == kind and isinstance(values.get("format_version"), int)


def is_current(
    directory: Path, kind: Kind, *, arguments: dict[str, Any], source: dict[str, Any]
) -> bool:
    """Whether `directory` is finished and this version would make the same from this input."""
    try:
        manifest = read_manifest(directory, kind)
    except UserError:
        return False
    # Compared as JSON, which is what the manifest went through.
    wanted = json.loads(json.dumps([arguments, source, code_digest()]))
    return [manifest.arguments, manifest.source, manifest.versions.get("code")] == wanted


def verify_all(directory: Path, kind: Kind) -> Manifest:
    """`read_manifest`, with every file hashed."""
    manifest = read_manifest(directory, kind)
    for name, entry in manifest.files.items():
        _check_file(directory / name, entry, True, _MADE_BY[kind].format(directory))
    return manifest


def _check_file(path: Path, entry: FileEntry, hashed: bool, command: str) -> None:
    fix = f"make the directory again with {command} --overwrite"
    if not path.is_file():
        raise UserError(f"{path} is missing, though the manifest names it; {fix}")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise UserError(
            f"{path} has {size_bytes} bytes, the manifest says {entry.size_bytes}; {fix}"
        )
    if hashed and sha256_of(path) != entry.sha256:
        raise UserError(f"{path} has changed since it was made (SHA-256 differs); {fix}")
