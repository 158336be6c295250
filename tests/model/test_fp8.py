"""E4M3 rounding, saturation and scales against a table made from the bit definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import LinearScales, fp8
from nvlm.model.number_formats.number_format import round_up
from tests.reference import fp8_e4m3


def codes(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy()


@pytest.mark.parametrize("scale", [1.0, 0.0131, 3.7e-5, 211.0])
def test_quantisation_is_clamped_nearest_even(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.exp(torch.empty(20_000).uniform_(-12, 8, generator=generator))
    x = scale * magnitudes * torch.randn(20_000, generator=generator).sign()
    assert np.array_equal(codes(fp8.quantize(x, scale)), fp8_e4m3.quantize(x.numpy(), scale))


def test_the_middle_between_two_numbers_goes_to_the_even_one() -> None:
    finite = np.unique(fp8_e4m3.TABLE[np.isfinite(fp8_e4m3.TABLE)])
    middles = torch.from_numpy((finite[:-1] + finite[1:]) / 2).to(torch.float32)
    expected = fp8_e4m3.quantize(middles.numpy(), 1.0)
    found = codes(fp8.quantize(middles, 1.0))
    assert np.array_equal(fp8_e4m3.TABLE[found], fp8_e4m3.TABLE[expected])


@pytest.mark.parametrize("value", [448.0, 449.0, 464.0, 470.0, 1e6, float("inf")])
def test_what_is_too_large_becomes_448_and_never_nan(value: float) -> None:
    """torch's own cast differs between versions for 470, so the clamp comes first."""
    x = torch.tensor([value, -value])
    assert fp8.dequantize(fp8.quantize(x, 1.0), 1.0).tolist() == [448.0, -448.0]


def test_every_finite_number_survives_a_round_trip() -> None:
    finite = torch.from_numpy(fp8_e4m3.TABLE[np.isfinite(fp8_e4m3.TABLE)]).to(torch.float32)
    for scale in (1.0, 0.25, 0.3):
        real = fp8.dequantize(finite.to(fp8.E4M3), scale)
        assert torch.equal(fp8.dequantize(fp8.quantize(real, scale), scale), real)


def test_scales_map_amax_to_448_and_zero_to_one() -> None:
    assert fp8.scale_from_amax(448.0) == 1.0
    assert fp8.scale_from_amax(0.0) == 1.0
    assert fp8.scale_from_amax(3.0) == float(np.float32(3.0) / np.float32(448.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_rounded_up_to_the_next_number(dtype: torch.dtype) -> None:
    """Also where float16 has subnormal numbers only, below 6.1e-5, or none, below 6e-8."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(2_000).uniform_(-38, math.log2(6e4), generator=generator)
    for exact in torch.exp2(exponents).tolist():
        rounded = torch.tensor(round_up(exact, dtype), dtype=torch.float32).to(dtype)
        below = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
        assert float(below) < exact <= float(rounded)
        assert round_up(float(rounded), dtype) == float(rounded), "a number of the type stays"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_scales_of_a_linear_are_those_of_the_definition(dtype: str) -> None:
    largest = float(torch.finfo(TORCH_DTYPES[dtype]).max)
    for amax in (3.0, 448.0, 0.0131, 1e-4, 1e-7, 211.7, largest):
        scales = fp8.FP8.scales_from_amax(amax, 2 * amax / 3, TORCH_DTYPES[dtype])
        assert scales.weight == fp8_e4m3.linear_scale(amax, dtype)
        assert scales.activation == fp8_e4m3.linear_scale(2 * amax / 3, dtype)
        assert math.isfinite(scales.weight)
    assert fp8.FP8.scales_from_amax(0.0, 0.0, TORCH_DTYPES[dtype]) == LinearScales(1.0, 1.0)
    assert fp8.FP8.scales_from_amax(1e-43, 1e-43, TORCH_DTYPES[dtype]).weight > 0.0


def test_an_fp8_linear_scales_before_it_adds_the_bias_and_rounds_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 64, generator=generator).to(torch.bfloat16)
    weight = torch.randn(32, 64, generator=generator)
    bias = torch.randn(32, generator=generator).to(torch.bfloat16)
    s_x, s_w = 0.011, 0.007
    linear = QuantizableLinear(
        fp8.quantize(weight, s_w),
        bias,
        number_format=fp8.FP8,
        scales=LinearScales(weight=s_w, activation=s_x),
    )
    q_x = fp8_e4m3.dequantize(fp8_e4m3.quantize(x.float().numpy(), s_x), s_x)
    q_w = fp8_e4m3.dequantize(fp8_e4m3.quantize(weight.numpy(), s_w), s_w)
    exact = torch.from_numpy(q_x @ q_w.T + bias.double().numpy())
    found = linear(x)
    assert found.dtype == torch.bfloat16
    # One rounding: never further from the exact value than the nearest bfloat16 (and float32's
    # own error, which may tip a tie).
    one_rounding = exact.to(torch.bfloat16)
    assert (found != one_rounding).float().mean() < 0.01
    linear.widen()
    assert torch.equal(linear(x), found), "widening changes no value"


@pytest.mark.gpu
def test_a_gpu_rounds_every_value_as_a_cpu_does() -> None:
    """Scales are amax / 448: dividing by a Python number on CUDA multiplies by its reciprocal."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1_000_000, generator=generator).to(torch.bfloat16)
        scale = fp8.scale_from_amax(float(x.abs().max()))
        assert np.array_equal(
            codes(fp8.quantize(x, scale)), codes(fp8.quantize(x.cuda(), scale).cpu())
        )


def test_the_smallest_amax_gives_a_scale_that_divides() -> None:
    assert fp8.scale_from_amax(1e-43) > 0.0
