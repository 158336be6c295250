"""The Triton kernels against their plain torch forms: on a GPU where there is one, otherwise in
Triton's interpreter, whose conversion to narrow types is replaced (`rounding`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nvlm import fp8
from nvlm.decoder_model import rope_tables
from runtime.decoder.kernels import plain_forms
from tests.tolerances import (
    E4M3_FLIPPED_SHARE,
    FLOAT32_LOGITS,
    KERNEL_BF16,
    relative_error,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # no bfloat16 products there
triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from runtime.decoder.kernels.streaming_linear import Tile, streaming_linear  # noqa: E402
from runtime.decoder.kernels.triton_forms import TritonForms  # noqa: E402
from runtime.decoder.kernels.workspace import Workspace  # noqa: E402
from runtime.kernels.prefetch import Prefetch, offsets  # noqa: E402
from runtime.kernels.quantization import scale_quantize  # noqa: E402

FORMS = TritonForms(DEVICE)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter loses the carry into the exponent (127 becomes 64) and NaN when it
    rounds to e4m3; a GPU does neither, so neither may the tests' arithmetic."""
    if DEVICE.type == "cuda":
        return
    convert = interpreter._convert_float

    def rounded(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if target != triton.language.float8e4nv or source != triton.language.float32:
            return convert(values, source, target, mode)
        contiguous = np.ascontiguousarray(values, dtype=np.float32)
        return torch.from_numpy(contiguous).to(fp8.E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def e4m3(*shape: int, seed: int = 0) -> torch.Tensor:
    return fp8.quantize(randn(*shape, seed=seed, dtype=torch.float32), 0.02)


def assert_same_e4m3(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few neighbours."""
    assert found.dtype == expected.dtype == fp8.E4M3
    a, b = (x.reshape(-1).view(torch.uint8).to(torch.int16) for x in (found, expected))
    zero_to_zero = ((a | b) & 0x7F) == 0  # of either sign
    differing = (a != b) & ~zero_to_zero
    assert float(differing.float().mean()) <= E4M3_FLIPPED_SHARE, f"{int(differing.sum())} differ"
    assert int(((a - b).abs() * ~zero_to_zero).max()) <= 1, "more than one e4m3 step apart"


@pytest.mark.parametrize("has_delta", [True, False], ids=["delta", "no delta"])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 128), (3, 200), (17, 1024)])
def test_add_rms_norm_equals_its_plain_form(num_tokens: int, size: int, has_delta: bool) -> None:
    hidden, weight = randn(num_tokens, size), randn(size, seed=1)
    delta = randn(num_tokens, size, seed=2) if has_delta else None
    for scale in (scalar(0.01), None):
        found = FORMS.add_rms_norm(hidden, delta, weight, 1e-6, scale)
        expected = plain_forms.add_rms_norm(hidden, delta, weight, 1e-6, scale)
        assert torch.equal(found[0], expected[0]), "the residual stream is exact"
        if scale is None:
            assert relative_error(found[1], expected[1]) < KERNEL_BF16
        else:
            assert_same_e4m3(found[1], expected[1])


def test_sums_of_ranks_are_rounded_before_they_are_added() -> None:
    hidden, weight, scale = randn(3, 200), randn(200, seed=1), scalar(0.01)
    sums = randn(3, 200, seed=2, dtype=torch.float32)
    found = FORMS.add_rms_norm(hidden, sums, weight, 1e-6, scale)
    rounded = FORMS.add_rms_norm(hidden, sums.to(DTYPE), weight, 1e-6, scale)
    plain = plain_forms.add_rms_norm(hidden, sums, weight, 1e-6, scale)
    for x in (rounded, plain):
        assert torch.equal(found[0], x[0])
    assert_same_e4m3(found[1], plain[1])


@pytest.mark.parametrize("num_tasks", [1, 3, 24, 64, 192, 512, 4000])
def test_the_numbers_of_splits_are_few_and_fit_the_workspace(num_tasks: int) -> None:
    workspace = Workspace.allocate(DEVICE, 264)
    splits = workspace.num_splits(num_tasks)
    assert splits in (1, 2, 4, 8, 16)
    if splits > 1:
        assert num_tasks * splits * 16 * 128 <= workspace.partial_sums.numel()
        assert num_tasks * splits * 2 * 16 <= workspace.stats.numel()


def test_values_beyond_448_are_clamped_and_nan_stays() -> None:
    hidden = randn(1, 128)
    hidden[0, 0] = 30000.0
    _, found = FORMS.add_rms_norm(hidden, None, randn(128).abs() + 1, 1e-6, scalar(1e-4))
    assert float(found.float()[0, 0]) == 448.0
    hidden[0, 1] = float("nan")
    _, found = FORMS.add_rms_norm(hidden, None, randn(128), 1e-6, scalar(0.01))
    assert bool(found.float().isnan().all())


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (5, 1500)])
def test_swiglu_quantize_equals_its_plain_form(num_tokens: int, size: int) -> None:
    gate_up = 3 * randn(num_tokens, 2 * size)
    found = FORMS.swiglu_quantize(gate_up, scalar(0.02))
    assert_same_e4m3(found, plain_forms.swiglu_quantize(gate_up, scalar(0.02)))


HEADS = [(2, 2, 64), (8, 1, 128), (16, 2, 128), (6, 3, 80)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rope_append_equals_its_plain_form(heads: int, kv_heads: int, head_dim: int) -> None:
    positions = torch.tensor([0, 5, 31, 32, 90], device=DEVICE)
    slots = positions + 32 * torch.tensor([0, 0, 0, 2, 1], device=DEVICE)
    qkv = randn(5, (heads + 2 * kv_heads) * head_dim)
    cos, sin = rope_tables(positions, head_dim, 1e6)
    shape = (6, kv_heads, 32, head_dim)
    ours, plain = ([torch.zeros(shape, device=DEVICE).to(fp8.E4M3) for _ in "kv"] for _ in "ab")
    found = FORMS.rope_append(qkv, cos, sin, slots, *ours, scalar(0.015))
    expected = plain_forms.rope_append(qkv, cos, sin, slots, *plain, scalar(0.015))
    assert relative_error(found, expected) < KERNEL_BF16
    for cache, oracle in zip(ours, plain, strict=True):
        assert_same_e4m3(cache, oracle)
        written = cache.float().abs().sum((1, 3)).flatten().nonzero().flatten()
        assert written.tolist() == sorted(slots.tolist()), "only the slots are written"


@triton.jit
def _write_offsets(target, num_bytes, rows, row_bytes, threads: tl.constexpr):
    program = tl.program_id(0)
    place = target + program * threads + tl.arange(0, threads)
    tl.store(place, offsets(program, num_bytes, rows, row_bytes, threads))


@pytest.mark.parametrize(
    ("limit", "num_rows", "expected"),
    [
        (5000, 1, [0, 1, 2, 3]),
        (10**9, 1, list(range(24))),
        (5000, 3, [0, 8, 16, 1]),  # eight kilobytes a row
        (10**9, 2, [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]),
        (1000, 1, []),
    ],
)
def test_what_comes_nearer_lies_in_the_weights(
    limit: int, num_rows: int, expected: list[int]
) -> None:
    weights = torch.zeros(3, 8192, dtype=torch.uint8, device=DEVICE).view(fp8.E4M3)
    part = Prefetch(limit, num_rows).of(weights)
    assert part.num_bytes == 1024 * len(expected)
    if expected:
        found = torch.zeros(part.num_programs(1) * 32, dtype=torch.int64, device=DEVICE)
        _write_offsets[(part.num_programs(1),)](
            found, part.num_bytes, part.rows, part.row_bytes, threads=32
        )
        kilobytes = (found // 1024).tolist()
        assert kilobytes[: len(expected)] == expected
        assert set(kilobytes) == set(expected), "what is beyond repeats the last"


def test_a_quotient_by_the_reciprocal_is_put_right_by_its_remainder() -> None:
    """The formula of runtime/kernels/quantization.py, its fused steps in float64."""
    rng = np.random.default_rng(0)
    drawn = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    x = drawn.bfloat16().float().numpy()
    scale = np.float32(rng.uniform(1e-3, 1.0, 1 << 21)) * np.float32(rng.choice([1.0, 1e-6, 1e3]))
    ties = np.float32(rng.integers(1, 16, 1 << 16) + 0.5) * scale[: 1 << 16]
    x[: 1 << 16] = ties
    reciprocal = np.float32(1) / scale
    near = np.clip(x * reciprocal, np.float32(-1024), np.float32(1024))
    remainder = np.float32(x.astype(np.float64) - near.astype(np.float64) * scale)
    found = np.float32(remainder.astype(np.float64) * reciprocal + near)
    expected = x / scale
    is_kept = np.abs(expected) < 1000
    assert np.array_equal(found[is_kept], expected[is_kept])
    assert (np.abs(found[~is_kept]) > 448).all()


def test_infinity_and_what_overflows_become_the_largest_number() -> None:
    x = torch.tensor([float("inf"), -float("inf"), 3e4, -6e4, 1e-4, 0.0], device=DEVICE).to(DTYPE)
    for scale in (1e-30, 1e-3):
        found = scale_quantize(x, 1.0, scalar(scale)).float()
        assert found[:4].tolist() == [448.0, -448.0, 448.0, -448.0]
        assert torch.equal(found, fp8.quantize(x, scale).float())


@dataclass(frozen=True, slots=True)
class Cached:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


def cached(heads: int, kv_heads: int, head_dim: int, lengths: list[int]) -> Cached:
    """Contexts on blocks in random order; what no request owns is NaN."""
    max_blocks = -(-max(lengths) // 32) + 1
    num_blocks = len(lengths) * max_blocks
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
    tables = order.view(len(lengths), max_blocks).to(torch.int32)
    k, v = (e4m3(num_blocks, kv_heads, 32, head_dim, seed=s) for s in (2, 3))
    for table, length in zip(tables, lengths, strict=True):
        for position in range(length, max_blocks * 32):
            for cache in (k, v):
                cache.view(torch.uint8)[table[position // 32], :, position % 32] = 0x7F
    q = randn(len(lengths), heads, head_dim, seed=4)
    return Cached(q, k, v, tables.to(DEVICE), torch.tensor(lengths, device=DEVICE).to(torch.int32))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_paged_attention_equals_its_plain_form(heads: int, kv_heads: int, head_dim: int) -> None:
    for lengths in ([1], [200], [33, 64, 1], [300, 5]):
        case = cached(heads, kv_heads, head_dim, lengths)
        arguments = (case.q, case.k, case.v, case.tables, case.lengths, scalar(0.02))
        clean = [torch.where(x.float().isnan(), 0.0, x.float()).to(x.dtype) for x in arguments[1:3]]
        expected = plain_forms.paged_attention(case.q, *clean, *arguments[3:], None)
        for _ in range(2):  # the counters are as they were
            found = FORMS.paged_attention(*arguments, None)
            assert relative_error(found, expected) < KERNEL_BF16
        quantised = FORMS.paged_attention(*arguments, scalar(0.01))
        assert relative_error(quantised.float(), fp8.quantize(expected, 0.01).float()) < 0.01


def test_a_request_of_a_batch_attends_as_it_does_alone() -> None:
    case = cached(8, 1, 128, [300, 5, 64])
    together = FORMS.paged_attention(
        case.q, case.k, case.v, case.tables, case.lengths, scalar(0.02), None
    )
    for i in range(3):
        alone = FORMS.paged_attention(
            case.q[i : i + 1], case.k, case.v, case.tables[i : i + 1],
            case.lengths[i : i + 1], scalar(0.02), None,
        )  # fmt: skip
        assert relative_error(alone[0], together[i]) < KERNEL_BF16


@pytest.mark.parametrize("num_rows", [1, 17, 64])
@pytest.mark.parametrize(("num_columns", "depth"), [(64, 256), (200, 1040)])
def test_streaming_linear_equals_its_plain_form(
    num_rows: int, num_columns: int, depth: int
) -> None:
    x, weight = e4m3(num_rows, depth), e4m3(num_columns, depth, seed=1)
    for bias in (None, randn(num_columns, seed=2)):
        arguments = (x, weight, scalar(3e-4), bias, torch.float32)
        expected = plain_forms.streaming_linear(*arguments)
        for _ in range(2):  # the counters are as they were
            assert relative_error(FORMS.streaming_linear(*arguments), expected) < FLOAT32_LOGITS


@pytest.mark.parametrize("num_programs", [1, 3, 7, 64])
def test_streaming_linear_divides_its_work_among_any_number_of_programs(num_programs: int) -> None:
    workspace = Workspace.allocate(DEVICE, num_programs)
    x, weight = e4m3(2, 1000), e4m3(150, 1000, seed=1)
    expected = plain_forms.streaming_linear(x, weight, scalar(1e-3), None, torch.float32)
    found = streaming_linear(
        x, weight, scalar(1e-3), None, torch.float32, workspace, Tile(32, 128, 4, 3)
    )
    assert relative_error(found, expected) < FLOAT32_LOGITS
    assert int(workspace.counters.abs().sum()) == 0


def test_a_row_of_a_streaming_linear_does_not_depend_on_the_others() -> None:
    x, weight = e4m3(9, 1040), e4m3(200, 1040, seed=1)
    together = FORMS.streaming_linear(x, weight, scalar(1e-3), None, DTYPE)
    alone = FORMS.streaming_linear(x[4:5].contiguous(), weight, scalar(1e-3), None, DTYPE)
    assert torch.equal(alone[0], together[4])


@pytest.mark.hopper
@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (8, 9),
    reason="FP8 tensor cores need a Hopper GPU",
)
@pytest.mark.parametrize("num_rows", [1, 8, 300])
def test_tensor_core_linear_equals_its_plain_form(num_rows: int) -> None:
    x, weight, bias = e4m3(num_rows, 1024), e4m3(512, 1024, seed=1), randn(512, seed=2)
    for b in (None, bias):
        arguments = (x, weight, scalar(3e-4), b, DTYPE)
        found = FORMS.tensor_core_linear(*arguments)
        assert relative_error(found, plain_forms.tensor_core_linear(*arguments)) < KERNEL_BF16
