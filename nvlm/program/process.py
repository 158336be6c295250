"""What is set once for a whole process: its log, warnings, streams, signals and environment.

Entry scripts set it up, through `run` (command_line.py) and `launch` (runtime/serving/launch.py),
and so do the models of a Triton server; nothing below them does.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, MutableMapping
from typing import NoReturn

from PIL import Image

from nvlm.program.errors import UserError

_CUBLAS = {"CUBLASLT_WORKSPACE_SIZE": "0"}
_NCCL = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def set_up_cublas(environment: MutableMapping[str, str]) -> None:
    """Gives torch's products no workspace. environment: os.environ, which torch reads before its
    first product on a GPU; what the user has set stays.

    Without a workspace cuBLAS neither splits the sum of few rows, for which an H200 pays with a
    second kernel, nor clears a counter before each product of many rows: decision 59
    (docs/decisions/decoder.md). CUBLAS_WORKSPACE_CONFIG stays unset: torch 2.11 reads it anew, for
    100 us, in every product.
    """
    for name, value in _CUBLAS.items():
        environment.setdefault(name, value)


def set_up_nccl(environment: MutableMapping[str, str]) -> None:
    """Does without the multicast of NVLink, which not every machine that has NVLink grants, and
    without torch's monitor of NCCL, which warns where rank 0 ends first (runtime/ranks/watch.py
    watches the ranks). environment: os.environ, before ranks on GPUs meet; what the user has set
    stays."""
    for name, value in _NCCL.items():
        environment.setdefault(name, value)


def set_up_log(rank: int) -> None:
    """The log goes to stderr, from rank 0 only except for errors."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(message)s" if rank == 0 else f"rank {rank}: %(message)s",
    )
    for package in ("nvlm", "build", "runtime", "evaluation"):
        logging.getLogger(package).setLevel(logging.INFO if rank == 0 else logging.ERROR)


def ignore_pillows_warnings() -> None:
    """Keeps from stderr what Pillow remarks on odd metadata and palettes; what matters is raised.

    Once a process: a filter set around each image (`warnings.catch_warnings`) would be taken back
    by one thread under the feet of another.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    _quiet_libtiff()


def _quiet_libtiff() -> None:
    """libtiff writes what it remarks straight to stderr; Pillow raises what matters of it. No other
    way is known but to ask the library that Pillow has loaded, where it is one of its own."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libtiff" in line}
        for path in paths:
            library = ctypes.CDLL(path)
            for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
                handler = getattr(library, name)
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                handler(None)
    except (OSError, AttributeError):
        return


def set_most_pixels(number: int) -> None:
    """Lets pictures have this many pixels. Pillow holds the limit, for the whole process, and ours
    is the same (nvlm/inputs/pillow_pages.py)."""
    Image.MAX_IMAGE_PIXELS = -(-number // 2)  # Pillow warns there and refuses from twice as many


def set_picture_types(names: Iterable[str]) -> None:
    """Has Pillow read no other formats, in the whole process; a server's, which strangers send
    pictures to."""
    Image.init()
    Image.ID[:] = [name.upper() for name in names]


class _Closed(io.TextIOBase):
    """Stands for a stdout that the caller closed: what is printed there would be lost silently."""

    def write(self, _text: str) -> NoReturn:
        raise UserError(
            "stdout is closed, and the answer goes there; leave >&- out, or give a file"
        )


def set_up_streams() -> None:
    """Questions and answers are UTF-8 whatever the locale. Another byte that is read becomes a lone
    surrogate, which a prompt refuses; a lone surrogate that is written is shown by number."""
    if sys.stdout is None:
        sys.stdout = _Closed()
        try:
            os.fstat(1)
        except OSError:  # the next file that is opened would get the number that libraries print to
            while os.open(os.devnull, os.O_WRONLY) < 1:
                pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def set_up_signals() -> None:
    """What a scheduler sends to stop a program ends it like Control-C: it cleans up and ends."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, _hang_up)


def die_of_sigterm() -> None:
    """Lets SIGTERM end the process at once and without a word, from now on."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _hang_up(*_: object) -> NoReturn:
    """The shell and the terminal both send it: the second must not end the cleaning up."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt
