"""What a TensorRT engine came out as: layers, their precision, size. Printed and written."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from build.engines.tensorrt_network import count_layers, num_fp8_products

_MAX_LINES = 12
_SHAPE_ARITHMETIC = ("INT64", "INT32", "BOOL")  # gone once compiled; not worth a line


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """Layers of an engine, counted by type and precision."""

    package: str  # tensorrt or tensorrt_rtx
    version: str  # of the package
    engine_bytes: int  # size of the engine's file
    num_fp8_products: int  # matrix products in FP8, as parsed
    network: dict[str, int]  # layers as parsed
    # Layers as compiled and fused. Empty: TensorRT-RTX compiles without a GPU, but its inspector
    # needs one.
    engine: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        kind = "compiled" if self.engine else "network"
        counts = {
            name: count
            for name, count in (self.engine or self.network).items()
            if not name.endswith(_SHAPE_ARITHMETIC)
        }
        most = sorted(counts.items(), key=lambda item: -item[1])
        rows = [f"  {count:>6} {name}" for name, count in most[:_MAX_LINES]]
        rest = sum(count for _, count in most[_MAX_LINES:])
        title = (
            f"{self.package} {self.version}: {self.engine_bytes / 1e6:.1f} MB, "
            f"{sum(counts.values())} {kind} layers, {self.num_fp8_products} FP8 products"
        )
        return [
            title,
            *rows,
            *([f"  {rest:>6} others"] if rest else []),
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(trt: Any, network: Any, plan: Any, logger: Any) -> EngineSummary:
    """`plan` is the serialised engine of `network`."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    return EngineSummary(
        package=trt.__name__,
        version=trt.__version__,
        engine_bytes=plan.nbytes,
        num_fp8_products=num_fp8_products(trt, network),
        network=count_layers(network),
        engine={} if engine is None else _compiled_layers(trt, engine),
    )


def _compiled_layers(trt: Any, engine: Any) -> dict[str, int]:
    """The inspector's layers. Its JSON is detailed because the build asked for that."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    counts: Counter[str] = Counter()
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):  # names only
            counts["layer"] += 1
            continue
        outputs = layer.get("Outputs") or [{}]
        counts[f"{layer.get('LayerType', '?')} {outputs[0].get('Format/Datatype', '?')}"] += 1
    return dict(sorted(counts.items()))
