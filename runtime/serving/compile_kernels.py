"""Compiles the kernels of an engine on this GPU and keeps them in its directory.

    [mpirun -n RANKS] python -m runtime.serving.compile_kernels --engine_dir D

Loads the engine and rehearses as a server does, with an empty cache of Triton's. build_engine.py
calls it for engines of one rank; docs/hopper.md says what it is good for.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nvlm.planning import hopper
from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError
from nvlm.program.launcher import end, rank_from
from runtime.engine.kept_kernels import about_kernels, keep_kernels
from runtime.engine.launchers import recording
from runtime.serving.launch import Program, add_engine_flags, engine_options, launch
from runtime.serving.rehearsal import rehearse
from runtime.serving.runner import Runner
from runtime.serving.server import Server

log = logging.getLogger("nvlm.compile_kernels")


def lead(
    arguments: argparse.Namespace,
    cache: Path,
    device: torch.device,
    open_runner: Callable[[], Runner],
) -> int:
    """What rank 0 does, or the only one."""
    if not hopper.has_kernels(device):
        raise UserError(
            f"{device} has no kernels to compile, expected a Hopper GPU or later and Triton; "
            "compile them where the engine runs"
        )
    with recording() as types, open_runner() as runner:
        server = Server(runner)
        try:
            rehearse(server)
        finally:
            server.close()
    try:
        number = keep_kernels(cache, arguments.engine_dir, about_kernels(device), types)
    except OSError as error:
        raise UserError(
            f"{error.filename or arguments.engine_dir} cannot be written: {error.strerror}; "
            "compile them where the directory is writable"
        ) from None
    log.info("%s keeps %d kernels for %s", arguments.engine_dir, number, about_kernels(device))
    return 0


def _parse(cache: Path) -> Program:
    """Reads the command line. Every rank does."""
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    add_engine_flags(parser, is_service=True)
    arguments = parser.parse_args()
    options = engine_options(arguments)
    return Program(arguments.engine_dir, arguments.device, options, partial(lead, arguments, cache))


def main() -> int:
    with TemporaryDirectory(prefix="nvlm_kernels_") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        return launch(os.environ, lambda: _parse(Path(folder)))


if __name__ == "__main__":
    run(main, rank=rank_from(os.environ), end=end)
