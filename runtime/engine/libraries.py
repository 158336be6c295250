"""The libraries under an engine's kernels: what they read from the environment of a process, and
what can be loaded of them before it is asked for."""

from __future__ import annotations

import logging
import threading
from collections.abc import MutableMapping

import torch

from nvlm.formats import layout
from nvlm.planning import hopper
from nvlm.program import startup
from nvlm.program.own_stream import own_stream
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.engine.engine_dir import EngineDir
from runtime.engine.kept_kernels import about_kernels, kernel_cache, use_kernels
from runtime.engine.launchers import compile_beside, hash_triton_beside, read_types

logger = logging.getLogger(__name__)


def has_kernels(engine: EngineDir, device: torch.device) -> bool:
    """Whether an engine runs by the kernels for Hopper."""
    is_ours = "torch" in (engine.decoder_target, engine.vision_executor)
    return is_ours and hopper.has_kernels(device)


def set_up_libraries(
    engine: EngineDir, device: torch.device, environment: MutableMapping[str, str]
) -> None:
    """Before the engine loads: sets cuBLAS up for the kernels on Hopper, gives Triton's cache those
    that the engine keeps, starts beside what their first launches would wait for, and sets up NCCL
    for the ranks of decoder torch. environment: os.environ. TensorRT-LLM keeps its own settings."""
    if has_kernels(engine, device):
        set_up_cublas(environment)
        load_cudnn_beside(device)
        hash_triton_beside()
        kernels = engine.directory / layout.KERNELS
        if kernels.is_dir():
            with startup.phase("copying kept kernels"):
                num_new = use_kernels(engine.directory, kernel_cache(), about_kernels(device))
            if num_new:
                compile_beside(read_types(kernels / layout.KERNEL_TYPES))
    if engine.decoder_target == "torch" and engine.checkpoint_config.tp_size > 1:
        set_up_nccl(environment)


def load_cudnn_beside(device: torch.device) -> None:
    """Starts a thread that makes the GPU's context and runs cuDNN's attention, whose libraries the
    first picture would load. It has a stream of its own. What keeps it from it does so again, and
    is raised, where a picture needs it."""
    if not torch.cuda.is_available():
        return
    index = torch.cuda.current_device() if device.index is None else device.index

    def load() -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(own_stream(index)):
                q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
                torch.ops.aten._scaled_dot_product_cudnn_attention(
                    q, q, q, attn_bias=None, compute_log_sumexp=False, is_causal=True
                )
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            logger.debug("cuDNN is loaded where it is needed: %r", error)

    threading.Thread(target=load, name="nvlm-cudnn").start()
