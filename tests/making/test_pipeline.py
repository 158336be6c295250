"""Threads of a conversion: few of torch's beside them, all of them where samples run."""

from __future__ import annotations

import pytest
import torch

from build.conversion.pipeline import few_threads


@pytest.mark.parametrize(("threads", "left"), [(1, 1), (2, 1), (4, 1), (16, 13)])
def test_torch_leaves_cores_to_the_other_threads_and_gets_them_back(
    monkeypatch: pytest.MonkeyPatch, threads: int, left: int
) -> None:
    found = [threads]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    with few_threads():
        assert found[-1] == left
    assert found[-1] == threads
