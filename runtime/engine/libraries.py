"""What the libraries under an engine's kernels read from the environment of a process."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from nvlm.formats import layout
from nvlm.planning import hopper
from nvlm.program import startup
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.engine.engine_dir import EngineDir
from runtime.engine.kept_kernels import about_kernels, kernel_cache, use_kernels
from runtime.engine.launchers import compile_beside, hash_triton_beside, read_types


def has_kernels(engine: EngineDir, device: torch.device) -> bool:
    """Whether an engine runs by the kernels for Hopper."""
    is_ours = "torch" in (engine.decoder_target, engine.vision_executor)
    return is_ours and hopper.has_kernels(device)


def set_up_libraries(
    engine: EngineDir, device: torch.device, environment: MutableMapping[str, str]
) -> None:
    """Before the engine loads: sets cuBLAS up for the kernels on Hopper, gives Triton's cache those
    that the engine keeps, has what launches them compiled beside, and sets up NCCL for the ranks of
    decoder torch. environment: os.environ. TensorRT-LLM keeps its own settings."""
    if has_kernels(engine, device):
        set_up_cublas(environment)
        hash_triton_beside()
        kernels = engine.directory / layout.KERNELS
        if kernels.is_dir():
            with startup.phase("copying kept kernels"):
                num_new = use_kernels(engine.directory, kernel_cache(), about_kernels(device))
            if num_new:
                compile_beside(read_types(kernels / layout.KERNEL_TYPES))
    if engine.decoder_target == "torch" and engine.checkpoint_config.tp_size > 1:
        set_up_nccl(environment)
