"""The vision model as an ONNX graph: what ONNX Runtime runs and TensorRT compiles.

The precision is in the graph (explicit types and casts, FP8 as Q/DQ), as a strongly typed TensorRT
network needs it; the number of tiles is dynamic.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from build.engines.qdq_linear import QdqLinear
from nvlm.formats import layout
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.number_formats import format_named
from nvlm.model.vision import VisionModel, linear_of

INPUT, OUTPUT = "tiles", "image_embeddings"
OPSET = 20  # the newest that TensorRT 10's parser covers in full

log = logging.getLogger(__name__)


def graph_module(checkpoint: VisionCheckpoint, precision: str, dtype: str) -> VisionModel:
    """The module to trace: plain linears in `dtype`; FP8 ones where `precision` says so.

    `dtype` names the type of everything that is not FP8: patch embedding, norms, attention
    products, residual stream and projector. Peak memory: the weights in `dtype`, twice for one
    tensor.
    """
    model = checkpoint.load_plain(dtype, torch.device("cpu"))
    for name, scales in checkpoint.read_scales(format_named(precision)).items():
        linear = linear_of(model, name)
        model.set_submodule(name, QdqLinear(linear.weight, linear.bias, scales))
    return model.requires_grad_(False).eval()


def export_graph(model: VisionModel, image_size: int, directory: Path) -> Path:
    """Writes `model.onnx` and `model.onnx.data`. Peak memory: about three times the weights."""
    dtype = model.vision_model.embeddings.patch_embedding.weight.dtype
    tiles = torch.zeros(2, 3, image_size, image_size, dtype=dtype)
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
    # What the exporter notes of our modules would change the file with their names.
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()
    path = directory / layout.GRAPH
    exported.save(path, external_data=True)
    return path
