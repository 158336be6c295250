"""Hashes of packages are pip's own, sorted by name, without torch."""

from __future__ import annotations

from typing import Any

import pytest

from nvlm.program.errors import UserError
from tools.hashed_requirements import hashed


def item(name: str, **hashes: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "version": "1.0"},
        "download_info": {"archive_info": {"hashes": hashes}},
    }


def test_each_package_has_its_hash_and_torch_is_left_out() -> None:
    report = {"install": [item("torch"), item("tqdm", sha256="b"), item("Ml_Dtypes", sha256="a")]}
    lines = hashed(report, "cpu.txt").splitlines()
    assert lines[-2:] == ["ml-dtypes==1.0 --hash=sha256:a", "tqdm==1.0 --hash=sha256:b"]
    assert not any(line.startswith("torch") for line in lines)


def test_a_package_without_a_hash_is_refused() -> None:
    with pytest.raises(UserError, match="no sha256 of tqdm"):
        hashed({"install": [item("tqdm")]}, "cpu.txt")
