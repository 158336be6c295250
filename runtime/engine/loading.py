"""What keeps a GPU from loading an engine, in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir


@contextmanager
def loading_on(device: torch.device, engine: EngineDir, doing: str = "loading") -> Iterator[None]:
    """The plan counts what is free at the start; another program may take of it meanwhile. And
    Triton builds what starts its kernels with the machine's compiler, unless its cache has it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise UserError(
            f"{engine.directory} ran out of memory on {device} while {doing}, {free / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB are free; end other programs there, build it with a smaller "
            "--max_seq_len or --max_num_tokens, or convert with --tp_size 2"
        ) from error
    except (RuntimeError, subprocess.CalledProcessError) as error:
        if not (isinstance(error, subprocess.CalledProcessError) or "C compiler" in str(error)):
            raise
        raise UserError(
            f"Triton needs a C compiler and Python's headers to run {engine.directory} on {device} "
            f"({error}); install them, on Debian and Ubuntu by apt-get install gcc python3-dev"
        ) from error
