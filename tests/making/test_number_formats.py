"""A number format is one file: one that the product has never seen is converted to, stored, read
and computed in, with nothing but its class and its row in the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.model import dtypes
from nvlm.model.number_formats import ACTIVATION_SCALE, QUANTIZED, WEIGHT_SCALE, NumberFormat
from nvlm.planning.memory_plan import decoder_weight_bytes
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.engine.engine_dir import EngineDir
from tests.conftest import BF16, CPU, Workshop
from tests.support.tolerances import FP8_LOGITS, relative_error

PROMPT = SequenceStep(list(range(40, 60)), 0, [0], None, 1)


class Int8(NumberFormat):
    """Weights and inputs as whole numbers up to 127 scales."""

    name = "INT8"
    largest = 127.0
    scale_shapes = MappingProxyType({WEIGHT_SCALE: (1,), ACTIVATION_SCALE: (1,)})

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def cache_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.int8

    def scale_from_amax(self, amax: float) -> float:
        return amax / self.largest

    def quantize(self, x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        return (x.to(torch.float32) / scale).round().clamp(-127, 127).to(torch.int8)

    def dequantize(self, stored: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        return stored.to(torch.float32) * scale

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        assert scales is not None
        weight_scale, scale = scales
        rows = self.dequantize(self.quantize(x, scale), scale)
        return nn.functional.linear(rows, weight.to(torch.float32) * weight_scale, bias)


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> Int8:
    number_format = Int8()
    monkeypatch.setitem(QUANTIZED, "INT8", number_format)
    monkeypatch.setitem(dtypes.SAFETENSORS_DTYPES, "I8", torch.int8)
    monkeypatch.setitem(dtypes.SAFETENSORS_NAMES, torch.int8, "I8")
    return number_format


def logits(engine_dir: Path) -> torch.Tensor:
    config = EngineDir.read(engine_dir).checkpoint_config
    weights = load_weights(open_weights(engine_dir / "llm", config), config, CPU)
    with torch.inference_mode():
        return PlainModel(config, weights, 1, CPU).forward([PROMPT])


def test_another_format_is_its_class_and_its_row(
    int8: Int8, fresh: Workshop, workshop: Workshop, model_dir: Path
) -> None:
    options = replace(BF16, quant_algo="INT8", calib_size=2)
    checkpoint = fresh.checkpoint("checkpoint_int8", model_dir, options)
    stored = SafetensorsReader(checkpoint / "rank0.safetensors").tensors
    linears = [name for name, info in stored.items() if info.dtype == torch.int8]
    assert len(linears) == 10, "five linears in each of two layers"
    engine = fresh.engine("engine_int8", checkpoint, vision="torch")
    narrow = EngineDir.read(engine).checkpoint_config
    assert narrow.weight_format is int8
    plain = workshop.checkpoint("checkpoint_bf16", model_dir, BF16)
    exact = workshop.engine("engine_bf16_torch", plain, vision="torch")
    wide = EngineDir.read(exact).checkpoint_config
    assert decoder_weight_bytes(narrow) < decoder_weight_bytes(wide)
    assert relative_error(logits(engine), logits(exact)) < FP8_LOGITS
