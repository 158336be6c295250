"""What the libraries under an engine's kernels read from the environment of a process."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from nvlm.planning import hopper
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.engine.engine_dir import EngineDir


def set_up_libraries(
    engine: EngineDir, device: torch.device, environment: MutableMapping[str, str]
) -> None:
    """Before the engine loads: sets cuBLAS up for the kernels on Hopper, and NCCL for the ranks of
    decoder torch. environment: os.environ. TensorRT-LLM keeps its own settings."""
    if "torch" in (engine.decoder_target, engine.vision_executor) and hopper.has_kernels(device):
        set_up_cublas(environment)
    if engine.decoder_target == "torch" and engine.checkpoint_config.tp_size > 1:
        set_up_nccl(environment)
