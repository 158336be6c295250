"""Vision target `onnxruntime`: an ONNX graph, run right after export and compared with torch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from build.engines.vision_onnx import INPUT, OUTPUT, export_graph, graph_module
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.vision import VisionModel
from nvlm.program.onnxruntime_package import onnxruntime

_MAX_RELATIVE_ERROR = {"float32": 1e-4, "float16": 2e-2}

log = logging.getLogger(__name__)


def export_vision(checkpoint: VisionCheckpoint, precision: str, directory: Path) -> None:
    """Writes `model.onnx` and `model.onnx.data`, then runs both models on 1, 2 and 7 tiles.

    Float32 (what ONNX Runtime's CPU kernels take) or float16. Raises `ExportMismatchError` when
    they disagree: such an export is never to be used.
    """
    model = graph_module(checkpoint, precision, precision)
    path = export_graph(model, checkpoint.config.image_size, directory)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for num_tiles in (1, 2, checkpoint.tiling.max_tiles_per_image):
        error = compare_with_torch(model, session, num_tiles)
        log.info("ONNX against torch, %d tiles: relative error %.1e", num_tiles, error)
        if not error <= _MAX_RELATIVE_ERROR[precision]:
            raise ExportMismatchError(f"{num_tiles} tiles: relative error {error}")


class ExportMismatchError(RuntimeError):
    """The exported graph computes something else than the module: a mistake of ours."""


def compare_with_torch(
    model: VisionModel, session: onnxruntime.InferenceSession, num_tiles: int
) -> float:
    """Relative error (2-norm) of ONNX Runtime against torch on random tiles."""
    parameter = next(model.parameters())
    size = model.patches_per_side * model.vision_model.embeddings.patch_embedding.kernel_size[0]
    generator = torch.Generator().manual_seed(num_tiles)
    tiles = torch.randn(num_tiles, 3, size, size, generator=generator).to(parameter.dtype)
    found = session.run([OUTPUT], {INPUT: tiles.numpy()})[0].astype(np.float64)
    with torch.inference_mode():
        expected = model(tiles).to(torch.float64).numpy()
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
