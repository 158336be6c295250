"""A short seed of the campaign that `make fuzz` runs: the same cases each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.kind import is_refused
from tests.fuzz.kinds import KINDS

_CASES = {"pictures": 150, "videos": 15}
_OTHERS = 60


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_read_or_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    opened = KINDS[kind].open(tmp_path)

    @settings(
        max_examples=_CASES.get(kind, _OTHERS),
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(opened.cases)
    def try_one(case: Any) -> None:
        refused.append(is_refused(opened, case))

    refused: list[bool] = []
    try_one()
    assert any(refused), "nothing was refused: the cases are not damaged"
