"""The one place that chooses between NVIDIA's packages of one API: TensorRT and TensorRT-RTX.

`tensorrt` (10.14 with TensorRT-LLM 1.2.1, or 11) is for data-centre GPUs such as Hopper,
`tensorrt_rtx` for RTX ones (Turing to Blackwell); it compiles without a GPU. Everything else takes
the module as an argument. Neither ships type information, so it is `Any`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from nvlm.program.errors import UserError

PACKAGES = ("tensorrt", "tensorrt_rtx")
INSTALL = {
    "tensorrt": 'pip install "tensorrt~=10.14.1"',
    "tensorrt_rtx": "pip install tensorrt-rtx",
}

log = logging.getLogger(__name__)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_tensorrt(package: str) -> Any:
    """The module; raises `UserError` when it cannot be imported (its libraries need a driver)."""
    assert package in PACKAGES
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise UserError(
            f"the {package} package cannot be imported ({error}); {INSTALL[package]}"
        ) from None


def compute_capability(trt: Any, wanted: str) -> Any:
    """The package's name for "8.9" and the like; raises `UserError` where it has none."""
    known = {
        f"{name[2:-1]}.{name[-1]}": name
        for name in dir(getattr(trt, "ComputeCapability", None))
        if name.startswith("SM")
    }
    if wanted not in known:
        raise UserError(
            f"--compute_capability {wanted} is not one of {trt.__name__}'s "
            f"({', '.join(known) or 'none: it builds for the GPU of this machine'})"
        )
    return getattr(trt.ComputeCapability, known[wanted])


def make_logger(trt: Any) -> Any:
    """A `trt.ILogger`; `errors` keeps what TensorRT complained about, which it raises nowhere."""
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message)
            log.debug("%s: %s", trt.__name__, message)

    return Logger()
