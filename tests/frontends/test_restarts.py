"""How often a server is started again, and what is said of it."""

from __future__ import annotations

import pytest

from nvlm.program.errors import PartDiedError
from nvlm.program.restarts import MOST, WITHIN_S, Restarts


def test_starts_are_counted_within_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    for _ in range(MOST):
        restarts.again("a part died", "its log is kept")
    assert capsys.readouterr().err == "starting again: a part died; its log is kept\n" * MOST
    with pytest.raises(PartDiedError, match=r"^a part died; that was start 4 .*help; its log is k"):
        restarts.again("a part died", "its log is kept")
    now = WITHIN_S
    restarts.again("a part died")
