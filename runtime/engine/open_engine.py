"""Reads an engine directory that these ranks, packages and this device can run."""

from __future__ import annotations

from pathlib import Path

import torch

from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.engine.engine_packages import require_packages


def open_engine(engine_dir: Path, device: torch.device, world_size: int = 1) -> EngineDir:
    """Raises `UserError` for an engine that `world_size` ranks cannot run on `device`."""
    engine = EngineDir.read(engine_dir)
    config = engine.checkpoint_config
    if engine.decoder_target == "torch" and config.pp_size > 1:
        raise UserError(
            f"{engine.directory} was converted with tp_size={config.tp_size}, "
            f"pp_size={config.pp_size}, and decoder 'torch' runs one stage only; convert with "
            f"--tp_size {config.world_size} --pp_size 1"
        )
    require_world_size(world_size, config.tp_size, config.pp_size)
    require_packages(engine, device)
    return engine


def require_world_size(world_size: int, tp_size: int, pp_size: int) -> None:
    """Raises `UserError` unless as many ranks run as the engine was built for."""
    expected = tp_size * pp_size
    if world_size != expected:
        raise UserError(
            f"engine_dir was built for tp_size={tp_size}, pp_size={pp_size} but {world_size} "
            f"{'rank is' if world_size == 1 else 'ranks are'} running; use mpirun -n {expected}"
        )
