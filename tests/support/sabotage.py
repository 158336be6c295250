"""A copy of the project whose server runs what a test writes into a file, at any time."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.command import ROOT

_ROOMS = ("nvlm", "build", "runtime", "frontends")

_SABOTEUR = """

def _obey(order):
    import pathlib, time
    order = pathlib.Path(order)
    while not order.exists():
        time.sleep(0.05)
    source = order.read_text()
    order.unlink()
    exec(source, globals())


import threading
threading.Thread(target=_obey, args=({order!r},), daemon=True).start()
"""

END_DECODER = """
import ctypes, threading
(thread,) = [t for t in threading.enumerate() if t.name == "nvlm-decoder"]
exception = ctypes.py_object(SystemExit)
ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), exception)
"""
"""Ends the decoder's thread at its next line."""

HANG_DECODER = """
import threading
from runtime.decoder.torch_executor import TorchDecoderExecutor
TorchDecoderExecutor.step = lambda self: threading.Event().wait()
"""
"""Its next step never ends."""


TRITON_MODEL = Path("frontends") / "triton" / "models" / "nvlm.py"
HTTP_SERVER = Path("frontends") / "openai" / "door.py"  # which a supervisor does not import


class Sabotaged:
    """`folder` is where a server starts; `order` is obeyed once, by who runs `module`."""

    def __init__(self, folder: Path, module: Path = TRITON_MODEL) -> None:
        self.folder, self._order = folder / "project", folder / "order"
        for room in _ROOMS:
            shutil.copytree(ROOT / room, self.folder / room)
        shutil.copy(ROOT / "serve.py", self.folder)
        with open(self.folder / module, "a") as file:
            file.write(_SABOTEUR.format(order=str(self._order)))

    def order(self, source: str) -> None:
        written = self._order.with_suffix(".written")
        written.write_text(source)
        written.rename(self._order)
