"""Where tritonserver is: in NVIDIA's container, else in the wheel nvidia-pytriton."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from frontends.triton.ascii_paths import in_ascii
from nvlm.program.errors import UserError

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True, slots=True)
class Program:
    """A tritonserver and what its Python backend needs to find this interpreter's packages."""

    path: Path  # of the program
    flags: tuple[str, ...]  # that it needs here
    environment: dict[str, str]  # variables that it needs here, beside this process's


def find_program(scratch: Path) -> Program:
    """`scratch` is a directory for the links the wheel's backend needs."""
    if CONTAINER_SERVER.is_file():
        return Program(CONTAINER_SERVER, (), {})
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise UserError(
            f"there is no Triton server: neither {CONTAINER_SERVER} (NVIDIA's containers) nor the "
            "wheel nvidia-pytriton (CPU); pip install -r requirements/triton.txt"
        )
    root = Path(spec.origin).parent / "tritonserver"
    return Program(
        root / "bin" / "tritonserver",
        ("--backend-directory", str(_link_backend(root, scratch))),
        {
            "LD_LIBRARY_PATH": _prepended(_libpython_dir(), "LD_LIBRARY_PATH"),
            "PATH": _prepended(_python_dir(scratch), "PATH"),
        },
    )


def _python_dir(scratch: Path) -> str:
    """Where the backend finds this interpreter, and by it this environment's packages."""
    directory = Path(sys.executable).parent
    return str(in_ascii(directory.parent, scratch / "environment") / directory.name)


def _prepended(directory: str, variable: str) -> str:
    given = os.environ.get(variable)
    return f"{directory}:{given}" if given else directory


def _link_backend(root: Path, scratch: Path) -> Path:
    """A backend folder with the stub of this Python in it. Links, because a copied backend does
    not find the libraries beside the original."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise UserError(f"nvidia-pytriton has no backend for Python {version}; use 3.11 or 3.12")
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True)
    source = root / "backends" / "python"
    for path in (
        source / "libtriton_python.so",
        source / "triton_python_backend_utils.py",
        stub,
    ):
        (backend / path.name).symlink_to(path)
    return backend.parent


def _libpython_dir() -> str:
    """Where libpython lies: the stub links to it and, without it, waits for ever."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for place in (*places, f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/local/lib"):
        if place and (Path(place) / name).is_file():
            return str(place)
    package = name.removesuffix(".so.1.0")
    raise UserError(
        f"{name} is not installed, which Triton's Python backend needs; apt install {package}, or "
        "use a Python that was built with --enable-shared"
    )
