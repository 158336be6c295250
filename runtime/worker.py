"""What ranks other than 0 do under `mpirun`: their part of every step, until rank 0 closes."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.decoder.executor import DecoderOptions, create_decoder_executor
from runtime.engine_dir import EngineDir
from runtime.engine_packages import require_packages
from runtime.mpi import World, require_world_size


def run_worker(
    engine_dir: Path, device: torch.device, world: World, options: DecoderOptions
) -> None:
    """Loads this rank's decoder and works; vision, tokenizer and answers are rank 0's."""
    assert world.rank > 0
    engine = EngineDir.read(engine_dir)
    config = engine.checkpoint_config
    require_world_size(world, config.tp_size, config.pp_size)
    require_packages(engine, device)
    create_decoder_executor(engine, device, options).run_worker()
