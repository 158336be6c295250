"""The vision encoder's fast path: with the kernels' plain twins against the module, and each kernel
against its twin (on a Hopper GPU if there is one, else in Triton's interpreter)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.inputs.tiling import normalize
from nvlm.model.vision import RMSNorm
from runtime.vision.hopper_model import HopperVisionModel
from runtime.vision.kernels.operands import ScaledDelta
from runtime.vision.kernels.plain_forms import PlainForms
from runtime.vision.torch_executor import TorchVisionExecutor
from tests.conftest import CPU
from tests.decoder import test_kernels
from tests.decoder.test_kernels import assert_same_e4m3, randn, rounding, scalar  # noqa: F401
from tests.support.tolerances import (
    BF16_VISION,
    E4M3_SUM,
    EXACT_GELU,
    FLOAT32_VISION,
    FP8_VISION,
    KERNEL_BF16,
    relative_error,
)

DEVICE = test_kernels.DEVICE
TILES = torch.randint(
    256, (7, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


PLAIN = PlainForms()


def rms_norm(weight: torch.Tensor, num_real_channels: int | None = None) -> RMSNorm:
    norm = RMSNorm(len(weight), 1e-6, num_real_channels)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def kernels() -> Any:
    from runtime.vision.kernels import triton_forms

    return triton_forms.TritonForms(DEVICE)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("float32", FLOAT32_VISION), ("bfloat16", BF16_VISION), ("FP8", E4M3_SUM)],
)
@torch.inference_mode()
def test_with_the_plain_twins_it_is_the_module(
    checkpoint_dir: Path, precision: str, tolerance: float
) -> None:
    model = VisionCheckpoint.read(checkpoint_dir / "vision").load(precision, CPU)
    tiles = normalize(TILES).to(model.vision_model.embeddings.class_embedding.dtype)
    found = HopperVisionModel(model, PLAIN)(TILES)
    assert relative_error(found, model(tiles)) < tolerance


def test_cut_patches_equals_its_plain_form() -> None:
    """Every pixel value among them, and bits: what is divided is rounded once each time."""
    tiles = torch.arange(2 * 28 * 42 * 3).reshape(2, 28, 42, 3)[:, :, :28].to(torch.uint8)
    tiles = tiles.contiguous().to(DEVICE)
    for dtype in (torch.float16, torch.float32):
        arguments = tiles, 14, 592, dtype
        assert torch.equal(kernels().cut_patches(*arguments), PLAIN.cut_patches(*arguments))


def test_embed_equals_its_plain_form() -> None:
    arguments = randn(3, 4, 130), randn(1, 1, 130, seed=1), randn(1, 5, 130, seed=2)
    assert torch.equal(kernels().embed(*arguments), PLAIN.embed(*arguments))


@pytest.mark.parametrize("has_delta", [True, False], ids=["delta", "no delta"])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 128), (5, 400)])
def test_add_rms_norm_equals_its_plain_form(num_tokens: int, size: int, has_delta: bool) -> None:
    hidden, norm = randn(2, num_tokens, size), rms_norm(randn(size, seed=1))
    added = ScaledDelta(randn(2, num_tokens, size, seed=2), randn(size, seed=3))
    for scale in (scalar(0.01), None):
        arguments = (hidden, added if has_delta else None, norm, scale)
        found, expected = (forms.add_rms_norm(*arguments) for forms in (kernels(), PLAIN))
        assert torch.equal(found[0], expected[0]), "the residual stream is exact"
        if scale is None:
            assert relative_error(found[1], expected[1]) < KERNEL_BF16
        else:
            assert_same_e4m3(found[1], expected[1])


@pytest.mark.parametrize(("size", "num_real"), [(128, 128), (320, 250)])
def test_normalize_qk_equals_its_plain_form(size: int, num_real: int) -> None:
    qkv, norms = randn(2, 3, 3 * size), [rms_norm(randn(size, seed=s), num_real) for s in (1, 2)]
    expected = PLAIN.normalize_qk(qkv, *norms)
    v = qkv[..., 2 * size :].clone()
    found = kernels().normalize_qk(qkv, *norms)
    assert relative_error(found, expected) < KERNEL_BF16
    assert torch.equal(found[..., 2 * size :], v)


def test_gelu_is_the_normal_distributions_whatever_comes() -> None:
    x = torch.linspace(-12, 12, 40001, device=DEVICE)
    expected = x.double() * torch.special.ndtr(x.double())
    found = kernels().gelu(x, None)
    assert torch.allclose(found.double(), expected, rtol=EXACT_GELU, atol=1e-8)
    extremes = torch.tensor([float("inf"), -float("inf"), float("nan")], device=DEVICE)
    assert kernels().gelu(extremes, None)[:1].tolist() == [float("inf")]
    assert abs(float(kernels().gelu(extremes, None)[1])) < 1e-8
    assert kernels().gelu(extremes, None)[2].isnan()


def test_gelu_equals_its_plain_form() -> None:
    x = 3 * randn(2, 5, 300)
    assert relative_error(kernels().gelu(x, None), PLAIN.gelu(x, None)) < KERNEL_BF16
    assert_same_e4m3(kernels().gelu(x, scalar(0.02)), PLAIN.gelu(x, scalar(0.02)))


def test_add_merge_norm_equals_its_plain_form() -> None:
    hidden, added = (
        randn(2, 1 + 36, 50),
        ScaledDelta(randn(2, 1 + 36, 50, seed=1), randn(50, seed=2)),
    )
    norm = nn.LayerNorm(200, eps=1e-5)
    norm.weight = nn.Parameter(randn(200, seed=3), requires_grad=False)
    norm.bias = nn.Parameter(randn(200, seed=4), requires_grad=False)
    found, expected = (forms.add_merge_norm(hidden, added, norm, 6) for forms in (kernels(), PLAIN))
    assert relative_error(found, expected) < KERNEL_BF16


def test_quantize_equals_its_plain_form() -> None:
    x = randn(2, 5, 300)
    assert_same_e4m3(kernels().quantize(x, scalar(0.01)), PLAIN.quantize(x, scalar(0.01)))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="torch sees no CUDA GPU")
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bfloat16", 2 * BF16_VISION), ("FP8", FP8_VISION)]
)
def test_on_a_gpu_it_is_the_cpus_module_and_graphs_change_no_bit(
    checkpoint_dir: Path, precision: str, tolerance: float
) -> None:
    checkpoint = VisionCheckpoint.read(checkpoint_dir / "vision")
    oracle = TorchVisionExecutor(checkpoint.load(precision, CPU), 7)
    graphs, launches = (
        TorchVisionExecutor(checkpoint.load(precision, DEVICE), 7, use_graphs=use_graphs)
        for use_graphs in (True, False)
    )
    graphs.warm_up()
    for num_tiles in (3, 1, 2, 7):
        tiles = TILES[:num_tiles] + num_tiles  # wraps around
        found = graphs.encode(tiles)
        assert torch.equal(found, launches.encode(tiles))
        error = relative_error(found.cpu(), oracle.encode(tiles))
        print(f"{precision}, {num_tiles} tiles: {error:.4f}")
        assert error < tolerance
