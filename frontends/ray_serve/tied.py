"""Runs a command that ends with the process that started it, however that one ends.

    python -m frontends.ray_serve.tied COMMAND...

The starter holds the other end of stdin open: a killed one can say nothing else. Ends with the
command's exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

_END_S = 10.0
"""Time in which a server whose clients have all gone frees its GPUs; then it is killed."""


def main() -> int:
    process = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # mpirun and its ranks are one group
    )
    threading.Thread(target=_end_with_starter, args=(process,), daemon=True).start()
    return process.wait()


def _end_with_starter(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):
        pass
    for number, seconds in ((signal.SIGTERM, _END_S), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


if __name__ == "__main__":
    # The end of stdin is the only order. A handler, since the command would inherit SIG_IGN.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    sys.exit(main())
