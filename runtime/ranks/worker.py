"""What ranks other than 0 do under `mpirun`: their part of every step, until rank 0 closes."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.decoder.executor import DecoderOptions
from runtime.ranks.mpi import Job
from runtime.serving.engine_parts import open_engine, open_parts


def run_worker(engine_dir: Path, device: torch.device, job: Job, options: DecoderOptions) -> None:
    """Loads this rank's part and works; requests, tokenizer and answers are rank 0's."""
    assert job.world.rank > 0
    engine = open_engine(engine_dir, device, job)
    _, decoder = open_parts(engine, device, job, options)
    job.phase("waiting for work")
    decoder.run_worker()
