"""How often a server is started again, and what is said of it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from nvlm.program.command_line import EXIT_INTERRUPTED
from nvlm.program.errors import PartDiedError
from nvlm.program.restarts import MOST, WITHIN_S, Restarts
from tests.support.command import ROOT


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


_IMPORTS_FOR_LONG = """
import time
from frontends.openai.supervisor import is_supervised, supervise
from nvlm.program.command_line import run
if is_supervised():
    print("importing", flush=True)
    time.sleep(60)
run(lambda: supervise("127.0.0.1", 0))
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("shell", [(), ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")])
def test_a_supervised_server_that_is_still_importing_is_interrupted_in_a_word(
    number: signal.Signals, shell: tuple[str, ...]
) -> None:
    """Also where a shell started it with `&`, which has SIGINT ignored."""
    words = [*shell, sys.executable, "-c", _IMPORTS_FOR_LONG]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (EXIT_INTERRUPTED, "interrupted\n")
