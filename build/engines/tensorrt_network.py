"""An ONNX file as a strongly typed TensorRT network: every type is the graph's own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any


class TensorrtBuildError(RuntimeError):
    """TensorRT refused a graph of ours; the message says which node, or what its log said."""


def parse_onnx(trt: Any, builder: Any, logger: Any, path: Path) -> Any:
    """The network of `path`, whose external weights lie beside it.

    Raises `TensorrtBuildError` that names the node the parser stopped at.
    """
    flags = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 and TensorRT-RTX know strongly typed networks only and may drop the flag.
    typed = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(
            f"node {error.node_name() or '?'} ({error.node_operator()}): {error.desc()}"
            for error in errors
        )
        raise TensorrtBuildError(
            f"{path.name} cannot be parsed by {trt.__name__} {trt.__version__}: "
            f"{reasons or '; '.join(logger.errors)}"
        )
    return network


def num_fp8_products(trt: Any, network: Any) -> int:
    """Matrix products both of whose factors come out of a DequantizeLinear of FP8 values."""
    kinds = trt.LayerType
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made_by = {
        layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)
    }

    def is_dequantised(tensor: Any) -> bool:
        layer = made_by.get(tensor.name)
        while layer is not None and layer.type in (kinds.SHUFFLE, kinds.CAST):
            layer = made_by.get(layer.get_input(0).name)  # a transposed weight, say
        return (
            layer is not None
            and layer.type == kinds.DEQUANTIZE
            and layer.get_input(0).dtype == trt.DataType.FP8
        )

    products = [layer for layer in layers if layer.type == kinds.MATRIX_MULTIPLY]
    return sum(
        is_dequantised(layer.get_input(0)) and is_dequantised(layer.get_input(1))
        for layer in products
    )


def count_layers(network: Any) -> dict[str, int]:
    """How often each kind of layer gives each type: {"MATRIX_MULTIPLY BF16": 5, ...}."""
    counts: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        dtype = layer.get_output(0).dtype
        counts[f"{_name(layer.type)} {_name(dtype)}"] += 1
    return dict(sorted(counts.items()))


def _name(member: Any) -> str:
    return str(member).rpartition(".")[2]
