"""The vision model as ONNX for ONNX Runtime, checked right after export.

Float32 (what ONNX Runtime's CPU kernels take) or float16; the number of tiles is dynamic.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from nvlm.vision_checkpoint import VisionCheckpoint
from nvlm.vision_model import VisionModel

INPUT, OUTPUT = "tiles", "image_embeddings"
FILE_NAME = "model.onnx"
OPSET = 20  # the newest that TensorRT 10's parser covers in full

_MAX_RELATIVE_ERROR = {"float32": 1e-4, "float16": 2e-2}

log = logging.getLogger(__name__)


def export_vision(checkpoint: VisionCheckpoint, precision: str, directory: Path) -> None:
    """Writes `model.onnx` and `model.onnx.data`, then runs both models on 1, 2 and 7 tiles.

    Raises `ExportMismatchError` when they disagree: such an export is never to be used. Peak
    memory: about three times the float32 weights.
    """
    model = checkpoint.load("float32", torch.device("cpu"))
    model.to({"float32": torch.float32, "float16": torch.float16}[precision])
    size = checkpoint.vision.image_size
    tiles = torch.randn(2, 3, size, size, dtype=next(model.parameters()).dtype)
    log.info("exporting the vision model to ONNX")
    # The exporter warns about torchvision, which is not there, and about its own internals.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.onnx.export(
            model,
            (tiles,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("num_tiles", min=1)},),
            verbose=False,  # it would report on stdout, which belongs to answers
        )
    assert exported is not None
    exported.save(directory / FILE_NAME, external_data=True)
    session = onnxruntime.InferenceSession(
        directory / FILE_NAME, providers=["CPUExecutionProvider"]
    )
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
