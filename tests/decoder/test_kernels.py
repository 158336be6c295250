"""The Triton kernels against their plain torch forms: on a Hopper GPU if there is one, else in
Triton's interpreter, whose conversion to narrow types is replaced (`rounding`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from nvlm.model.decoder import rope_tables
from nvlm.model.number_formats import fp8
from runtime.decoder.kernels.operands import (
    CacheScale,
    ChunkTiles,
    Contexts,
    KVPages,
    Norm,
    TokenRows,
    tile_tokens,
)
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.kernels.fp8_linear import Fp8Linear
from tests.conftest import HAS_HOPPER
from tests.support.tolerances import (
    E4M3_AFTER_ATTENTION,
    E4M3_AFTER_TENSOR_CORES,
    E4M3_FLIPPED_SHARE,
    KERNEL_BF16,
    PREFILL_ATTENTION,
    relative_error,
)

DEVICE = torch.device("cuda" if HAS_HOPPER else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # no bfloat16 products there
triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime import interpreter  # noqa: E402

from runtime.decoder.kernels.chunk_attention import chunk_attention  # noqa: E402
from runtime.decoder.kernels.decode_attention import Step, decode_attention  # noqa: E402
from runtime.decoder.kernels.elementwise import swiglu_quantize  # noqa: E402
from runtime.decoder.kernels.gate_up_swiglu import gate_up_swiglu  # noqa: E402
from runtime.decoder.kernels.gather_contexts import gather_contexts  # noqa: E402
from runtime.decoder.kernels.triton_forms import TritonForms  # noqa: E402
from runtime.decoder.kernels.workspace import Workspace  # noqa: E402
from runtime.decoder.models.chunk_inputs import pages_of, tiles_of  # noqa: E402
from runtime.decoder.models.step import SequenceStep  # noqa: E402
from runtime.kernels.quantization import quantize_tensor  # noqa: E402
from runtime.kernels.spare_rows import (  # noqa: E402
    empty_with_spare_rows,
    with_spare_rows,
)
from runtime.vision.kernels.triton_forms import TritonForms as VisionTritonForms  # noqa: E402

FORMS, PLAIN = TritonForms(DEVICE), PlainForms()


BY_CUBLASLT = [
    pytest.mark.hopper,
    pytest.mark.skipif(not HAS_HOPPER, reason="cuBLASLt's FP8 products need a Hopper GPU"),
]


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


def fp8_linear(
    out_features: int, in_features: int, scale: float, bias: torch.Tensor | None = None
) -> Fp8Linear:
    weight = e4m3(out_features, in_features, seed=1)
    return Fp8Linear(weight, scalar(0.02), scalar(scale), bias)


DOWN = Fp8Linear(e4m3(16, 16), scalar(0.1), scalar(1.0))
"""The linear after gate and up, whose input they quantise."""


def assert_same_e4m3(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few neighbours."""
    assert found.dtype == expected.dtype == fp8.E4M3
    a, b = (x.reshape(-1).view(torch.uint8).to(torch.int16) for x in (found, expected))
    zero_to_zero = ((a | b) & 0x7F) == 0  # of either sign
    differing = (a != b) & ~zero_to_zero
    assert float(differing.float().mean()) <= E4M3_FLIPPED_SHARE, f"{int(differing.sum())} differ"
    assert int(((a - b).abs() * ~zero_to_zero).max()) <= 1, "more than one e4m3 step apart"


@pytest.mark.parametrize("forms", [TritonForms, VisionTritonForms])
def test_every_plain_form_has_its_kernel(forms: type) -> None:
    """One that is missing would run in plain torch on a GPU, right but slow."""
    plain = {name for name in vars(forms.__mro__[1]) if not name.startswith("_")}
    assert len(plain) >= 8
    assert plain <= set(vars(forms))


@pytest.mark.parametrize("has_delta", [True, False], ids=["delta", "no delta"])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 128), (3, 200), (17, 1024)])
def test_add_rms_norm_equals_its_plain_form(num_tokens: int, size: int, has_delta: bool) -> None:
    hidden, weight = randn(num_tokens, size), randn(size, seed=1)
    delta = randn(num_tokens, size, seed=2) if has_delta else None
    for scale in (scalar(0.01), None):
        arguments = (hidden, delta, Norm(weight, 1e-6), scale)
        found, expected = (forms.add_rms_norm(*arguments) for forms in (FORMS, PLAIN))
        assert torch.equal(found[0], expected[0]), "the residual stream is exact"
        if scale is None:
            assert relative_error(found[1], expected[1]) < KERNEL_BF16
        else:
            assert_same_e4m3(found[1], expected[1])


def test_sums_of_ranks_are_rounded_before_they_are_added() -> None:
    hidden, norm, scale = randn(3, 200), Norm(randn(200, seed=1), 1e-6), scalar(0.01)
    sums = randn(3, 200, seed=2, dtype=torch.float32)
    found = FORMS.add_rms_norm(hidden, sums, norm, scale)
    rounded = FORMS.add_rms_norm(hidden, sums.to(DTYPE), norm, scale)
    plain = PLAIN.add_rms_norm(hidden, sums, norm, scale)
    for x in (rounded, plain):
        assert torch.equal(found[0], x[0])
    assert_same_e4m3(found[1], plain[1])


@pytest.mark.parametrize("num_tasks", [1, 3, 24, 64, 192, 512, 4000])
def test_the_numbers_of_splits_are_few_and_fit_the_workspace(num_tasks: int) -> None:
    workspace = Workspace.allocate(DEVICE, 264)
    for crowd in (1, 2, 4):
        splits = workspace.num_splits(num_tasks, crowd, max_splits=16)
        assert splits in (1, 2, 4, 8, 16)
        if splits > 1:
            assert num_tasks * splits * 16 * 128 <= workspace.partial_sums.numel()
            assert num_tasks * splits * 2 * 16 <= workspace.stats.numel()


def test_values_beyond_448_are_clamped_and_nan_stays() -> None:
    hidden = randn(1, 128)
    hidden[0, 0] = 30000.0
    norm = Norm(randn(128).abs() + 1, 1e-6)
    _, found = FORMS.add_rms_norm(hidden, None, norm, scalar(1e-4))
    assert float(found.float()[0, 0]) == 448.0
    hidden[0, 1] = float("nan")
    _, found = FORMS.add_rms_norm(hidden, None, Norm(randn(128), 1e-6), scalar(0.01))
    assert bool(found.float().isnan().all())


@pytest.mark.parametrize("num_rows", [1, 5, 16, pytest.param(17, marks=BY_CUBLASLT)])
@pytest.mark.parametrize(("size", "depth"), [(32, 256), (104, 1040)])
def test_gate_up_swiglu_equals_its_plain_form(num_rows: int, size: int, depth: int) -> None:
    x, gate_up = e4m3(num_rows, depth), fp8_linear(2 * size, depth, 3e-4)
    arguments = (x, gate_up, DOWN, DTYPE)
    found, expected = (forms.gate_up_swiglu(*arguments) for forms in (FORMS, PLAIN))
    assert relative_error(found.float(), expected.float()) < E4M3_AFTER_TENSOR_CORES


@pytest.mark.parametrize("num_programs", [1, 3, 7, 64])
def test_gate_up_swiglu_divides_its_work_among_any_number_of_programs(num_programs: int) -> None:
    workspace = Workspace.allocate(DEVICE, num_programs)
    arguments = (e4m3(2, 1000), fp8_linear(300, 1000, 1e-3), DOWN, DTYPE)
    found = gate_up_swiglu(*arguments, workspace)
    expected = PLAIN.gate_up_swiglu(*arguments)
    assert relative_error(found.float(), expected.float()) < E4M3_AFTER_TENSOR_CORES
    assert int(workspace.counters.abs().sum()) == 0


def test_a_row_of_gate_up_swiglu_does_not_depend_on_the_others() -> None:
    x, gate_up = e4m3(9, 1040), fp8_linear(200, 1040, 1e-3)
    together = FORMS.gate_up_swiglu(x, gate_up, DOWN, DTYPE)
    alone = FORMS.gate_up_swiglu(x[4:5], gate_up, DOWN, DTYPE)
    assert torch.equal(alone[0].float(), together[4].float())


def test_swiglu_quantize_equals_the_formula() -> None:
    for num_tokens, size in ((1, 64), (5, 1500)):
        gate_up = 3 * randn(num_tokens, 2 * size)
        gate, up = gate_up.float().chunk(2, dim=-1)
        expected = fp8.quantize((torch.nn.functional.silu(gate) * up).to(DTYPE), scalar(0.02))
        assert_same_e4m3(swiglu_quantize(gate_up, scalar(0.02)), expected)


def pages(caches: Sequence[torch.Tensor], scale: float) -> KVPages:
    """e4m3 with a scale of K and a larger one of V, other types without."""
    k, v = caches
    if k.dtype != fp8.E4M3:
        return KVPages(k, v, None, None)
    return KVPages(k, v, *(CacheScale(scalar(each), each) for each in (scale, 1.3 * scale)))


def cache(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return e4m3(*shape, seed=seed) if dtype == fp8.E4M3 else randn(*shape, seed=seed, dtype=dtype)


def assert_same_stored(found: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.dtype == fp8.E4M3:
        assert_same_e4m3(found, expected)
    else:
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) < KERNEL_BF16


CACHES = pytest.mark.parametrize("stored", [fp8.E4M3, DTYPE], ids=["e4m3", "dtype"])
"""What keys and values are stored in."""


NAN_BYTE = 0xFF
"""A byte of NaN in every type."""

HEADS = [(2, 2, 64), (8, 1, 128), (40, 2, 96), (6, 3, 80)]  # groups of 1 to 20


@CACHES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rope_append_equals_its_plain_form(
    heads: int, kv_heads: int, head_dim: int, stored: torch.dtype
) -> None:
    positions = torch.tensor([0, 5, 31, 32, 90], device=DEVICE)
    slots = positions + 32 * torch.tensor([0, 0, 0, 2, 1], device=DEVICE)
    qkv = randn(5, (heads + 2 * kv_heads) * head_dim)
    rows = TokenRows(*rope_tables(positions, head_dim, 1e6), slots)
    shape = (6, kv_heads, 32, head_dim)
    ours, plain = ([torch.zeros(shape, device=DEVICE).to(stored) for _ in "kv"] for _ in "ab")
    found = FORMS.rope_append(qkv, rows, pages(ours, 0.015))
    expected = PLAIN.rope_append(qkv, rows, pages(plain, 0.015))
    assert relative_error(found, expected) < KERNEL_BF16
    for kept, oracle in zip(ours, plain, strict=True):
        assert_same_stored(kept, oracle)
        written = kept.float().abs().sum((1, 3)).flatten().nonzero().flatten()
        assert written.tolist() == sorted(slots.tolist()), "only the slots are written"


def test_spare_rows_are_memorys_own_or_a_copys() -> None:
    x = empty_with_spare_rows(3, 4, dtype=torch.float32, device=DEVICE)
    x.copy_(torch.arange(12.0).view(3, 4))
    for rows, same in ((x, True), (x[1:], True), (x.clone(), False)):
        longer = with_spare_rows(rows, 8)
        assert longer.shape == (8, 4)
        assert torch.equal(longer[: len(rows)], rows)
        assert (longer.data_ptr() == rows.data_ptr()) == same


def test_a_quotient_by_the_reciprocal_is_put_right_by_its_remainder() -> None:
    """The formula of runtime/kernels/quantization.py, its fused steps in float64."""
    rng = np.random.default_rng(0)
    drawn = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    x = drawn.bfloat16().float().numpy()
    factors = rng.choice([1.0, 1e-6, 1e3], 1 << 21)
    scale = np.float32(rng.uniform(1e-3, 1.0, 1 << 21) * factors)
    ties = np.float32(rng.integers(1, 16, 1 << 16) + 0.5) * scale[: 1 << 16]
    x[: 1 << 16] = ties
    x[-2:] = np.inf, -np.inf
    most = np.float32(448) * scale
    inside = np.clip(x, -most, most)
    reciprocal = np.float32(1) / scale
    near = inside * reciprocal
    remainder = np.float32(inside.astype(np.float64) - near.astype(np.float64) * scale)
    found = np.float32(remainder.astype(np.float64) * reciprocal + near)
    expected = x / scale
    is_inside = np.abs(x) < most
    assert np.array_equal(found[is_inside], expected[is_inside])
    assert 0.5 < is_inside.mean() < 0.8
    in_e4m3, clamped = torch.from_numpy(found).to(fp8.E4M3), np.clip(expected, -448, 448)
    assert torch.equal(in_e4m3.float(), torch.from_numpy(clamped).to(fp8.E4M3).float())


def test_infinity_and_what_overflows_become_the_largest_number() -> None:
    x = torch.tensor([float("inf"), -float("inf"), 3e4, -6e4, 1e-4, 0.0], device=DEVICE).to(DTYPE)
    for scale in (1e-30, 1e-3):
        found = quantize_tensor(x, scalar(scale)).float()
        assert found[:4].tolist() == [448.0, -448.0, 448.0, -448.0]
        assert torch.equal(found, fp8.quantize(x, scale).float())


@dataclass(frozen=True, slots=True)
class Cached:
    """What `decode_attention` takes, up to its scales; the caches are copied for each call."""

    qkv: torch.Tensor
    rows: TokenRows
    caches: tuple[torch.Tensor, ...]
    tables: torch.Tensor
    positions: torch.Tensor

    def part(self, part: slice) -> Cached:
        rows = TokenRows(self.rows.cos[part], self.rows.sin[part], self.rows.slots[part])
        return Cached(self.qkv[part], rows, self.caches, self.tables[part], self.positions[part])

    def attended(
        self, forms: object, scale: torch.Tensor | None, *options: object
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        caches = [each.clone() for each in self.caches]
        attend = getattr(forms, "decode_attention", forms)
        own = pages(caches, 0.02)
        out = attend(self.qkv, self.rows, self.tables, self.positions, own, scale, *options)
        return out, caches


def cached(
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    stored: torch.dtype = fp8.E4M3,
) -> Cached:
    """Contexts on blocks in random order; what no request has written yet is NaN."""
    max_blocks = -(-max(lengths) // 32) + 1
    num_blocks = len(lengths) * max_blocks
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
    tables = order.view(len(lengths), max_blocks).to(torch.int32)
    k, v = (cache(num_blocks, kv_heads, 32, head_dim, seed=s, dtype=stored) for s in (2, 3))
    slots = []
    for table, length in zip(tables, lengths, strict=True):
        slots.append(int(table[(length - 1) // 32]) * 32 + (length - 1) % 32)
        for position in range(length - 1, max_blocks * 32):
            for each in (k, v):
                each.view(torch.uint8)[table[position // 32], :, position % 32] = NAN_BYTE
    positions = torch.tensor(lengths, device=DEVICE) - 1
    qkv = randn(len(lengths), (heads + 2 * kv_heads) * head_dim, seed=4)
    rows = TokenRows(*rope_tables(positions, head_dim, 1e6), torch.tensor(slots, device=DEVICE))
    return Cached(qkv, rows, (k, v), tables.to(DEVICE), positions.to(torch.int32))


@CACHES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decode_attention_equals_its_plain_form(
    heads: int, kv_heads: int, head_dim: int, stored: torch.dtype
) -> None:
    # Up to 8 requests and more take other steps.
    for lengths in ([1], [200], [33, 64, 1], [*range(1, 100, 11)]):
        case = cached(heads, kv_heads, head_dim, lengths, stored)
        finite = (torch.where(x.float().isnan(), 0.0, x.float()).to(x.dtype) for x in case.caches)
        expected, written = replace(case, caches=tuple(finite)).attended(PLAIN, None)
        found, caches = case.attended(FORMS, None)
        assert relative_error(found, expected) < KERNEL_BF16
        for kept, oracle, before in zip(caches, written, case.caches, strict=True):
            newest = (x[case.rows.slots // 32, :, case.rows.slots % 32] for x in (kept, oracle))
            assert_same_stored(*newest)
            changed = kept.view(torch.uint8) != before.view(torch.uint8)
            blocks, _, places, _ = changed.nonzero(as_tuple=True)
            assert {*(32 * blocks + places).tolist()} == {*case.rows.slots.tolist()}
        quantised, _ = case.attended(FORMS, scalar(0.01))  # the counters are as they were
        in_e4m3 = fp8.quantize(expected, 0.01).float()
        assert relative_error(quantised.float(), in_e4m3) < E4M3_AFTER_ATTENTION


@CACHES
def test_a_request_of_a_batch_attends_as_it_does_alone(stored: torch.dtype) -> None:
    case = cached(8, 1, 128, [300, 5, 64], stored)
    together, _ = case.attended(FORMS, None)
    for i in range(3):
        alone, _ = case.part(slice(i, i + 1)).attended(FORMS, None)
        assert relative_error(alone[0], together[i]) < KERNEL_BF16


@dataclass(frozen=True)
class Chunks:
    """Rows of `num_rows` tokens in chunks, and some that are nobody's after them."""

    q: torch.Tensor
    tiles: ChunkTiles
    contexts: Contexts
    pages: KVPages
    num_rows: int

    def attended(
        self,
        attend: Callable[..., None],  # a form, or the kernel's own, which takes a workspace
        scale: torch.Tensor | None,
        *workspace: Workspace,
    ) -> torch.Tensor:
        out = torch.ones(len(self.q), self.q[0].numel(), device=DEVICE)
        out = out.to(DTYPE if scale is None else fp8.E4M3)
        attend(self.q, self.tiles, self.contexts, self.pages, scale, out, *workspace)
        return out


def contexts_of(steps: list[SequenceStep], own: KVPages, dtype: torch.dtype) -> Contexts:
    """Their pages, and memory that is NaN before anything is gathered, with a page more."""
    filled = pages_of(steps)
    spare = torch.full((2, 2), 7, dtype=torch.int32)  # after those that are filled
    _, kv_heads, block_size, head_dim = own.k.shape
    num_positions = block_size * (len(filled) + len(spare))
    shape = (2, kv_heads, num_positions, triton.next_power_of_2(head_dim))
    k, v = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    num_pages = torch.tensor([len(filled)], dtype=torch.int32, device=DEVICE)
    return Contexts(torch.cat([filled, spare]).to(DEVICE), num_pages, k, v)


def wide(stored: torch.dtype) -> torch.dtype:
    return torch.float16 if stored == fp8.E4M3 else stored


PARTS = ((0, 1), (0, 20), (37, 9), (63, 2), (70, 40), (250, 9))
"""The first position of each chunk, and its rows."""


def chunks(
    heads: int,
    kv_heads: int,
    head_dim: int,
    stored: torch.dtype,
    parts: tuple[tuple[int, int], ...] = PARTS,
) -> Chunks:
    num_rows, spare = sum(rows for _, rows in parts), 3
    max_blocks = max(first + rows for first, rows in parts) // 32 + 1
    order = torch.randperm(len(parts) * max_blocks, generator=torch.Generator().manual_seed(1))
    tables = order.view(len(parts), max_blocks).tolist()
    caches = [cache(len(order), kv_heads, 32, head_dim, seed=s, dtype=stored) for s in (2, 3)]
    for kept in caches:  # what no chunk has written yet
        for table, (first_position, rows) in zip(tables, parts, strict=True):
            for position in range(first_position + rows, max_blocks * 32):
                kept.view(torch.uint8)[table[position // 32], :, position % 32] = NAN_BYTE
    num_tokens = tile_tokens(heads // kv_heads)
    steps = [
        SequenceStep([0] * rows, first, table, None, 0)
        for table, (first, rows) in zip(tables, parts, strict=True)
    ]
    of_nobody = torch.zeros(2, 4, dtype=torch.int32)
    rows_of_tiles = torch.cat([tiles_of(steps, num_tokens), of_nobody]).to(DEVICE)
    q = randn(num_rows + spare, heads, head_dim)
    tiles, own = ChunkTiles(rows_of_tiles, num_tokens), pages(caches, 0.02)
    return Chunks(q, tiles, contexts_of(steps, own, wide(stored)), own, num_rows)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@CACHES
def test_chunk_attention_equals_its_plain_form(
    heads: int, kv_heads: int, head_dim: int, stored: torch.dtype
) -> None:
    """Chunks of several sequences, at their beginnings and later, and rows that are nobody's."""
    case = chunks(heads, kv_heads, head_dim, stored)
    num_rows = case.num_rows
    for scale, tolerance in ((None, PREFILL_ATTENTION), (scalar(0.01), E4M3_AFTER_ATTENTION)):
        found, expected = (
            case.attended(forms.chunk_attention, scale).float() for forms in (FORMS, PLAIN)
        )
        assert relative_error(found[:num_rows], expected[:num_rows]) < tolerance
        assert (found[num_rows:] == 1).all()


@pytest.mark.parametrize("num_rows", [1, 255, 256, 300])
@CACHES
def test_chunk_attention_takes_whole_prompts(num_rows: int, stored: torch.dtype) -> None:
    case = chunks(4, 2, 64, stored, ((0, num_rows),))
    found, expected = (case.attended(forms.chunk_attention, None) for forms in (FORMS, PLAIN))
    assert relative_error(found[:num_rows], expected[:num_rows]) < PREFILL_ATTENTION


@CACHES
def test_contexts_are_gathered_as_they_are_stored(stored: torch.dtype) -> None:
    """And nothing else: what no context holds is zero up to its end in memory, NaN after it."""
    case = chunks(4, 2, 48, stored)
    contexts = case.contexts
    gather_contexts(case.pages, contexts)
    for kept, gathered in ((case.pages.k, contexts.k), (case.pages.v, contexts.v)):
        for page, (block, count) in enumerate(contexts.pages[: int(contexts.num_pages)].tolist()):
            place = slice(32 * page, 32 * page + 32)
            expected = torch.zeros_like(gathered[:, place])
            expected[:, :count, :48] = kept[block, :, :count].to(gathered.dtype)
            assert torch.equal(gathered[:, place], expected)
        assert gathered[:, 32 * int(contexts.num_pages) :].isnan().all()


@CACHES
@pytest.mark.parametrize("num_programs", [1, 25, 50, 200])
def test_chunk_attention_does_not_depend_on_how_it_is_divided(
    num_programs: int, stored: torch.dtype
) -> None:
    """Whole, and in two, three or four splits; rows of a chunk see nothing of the last ones."""
    case = chunks(8, 1, 128, stored)
    expected = case.attended(FORMS.chunk_attention, None)[: case.num_rows]
    workspace = Workspace.allocate(DEVICE, num_programs)
    for buffer in (workspace.partial_sums, workspace.stats):
        buffer.fill_(float("nan"))
    for _ in range(2):
        found = case.attended(chunk_attention, None, workspace)[: case.num_rows]
        assert relative_error(found, expected) < KERNEL_BF16
    assert int(workspace.counters.abs().sum()) == 0


@CACHES
@pytest.mark.parametrize("num_programs", [1, 4, 32])
def test_decode_attention_does_not_depend_on_how_it_is_divided(
    num_programs: int, stored: torch.dtype
) -> None:
    """Whole, in two or four, and in as many splits as there are at most."""
    case = cached(8, 1, 128, [300, 5], stored)
    expected, _ = case.attended(FORMS, None)
    workspace = Workspace.allocate(DEVICE, num_programs)
    for step in (Step(128, 4, 3, 1), Step(32, 1, 3, 4), Step(64, 4, 3, 1)):
        found, _ = case.attended(decode_attention, None, workspace, step)
        assert relative_error(found, expected) < KERNEL_BF16
    assert int(workspace.counters.abs().sum()) == 0


@pytest.mark.parametrize(
    "num_rows", [pytest.param(count, marks=BY_CUBLASLT) for count in (1, 8, 300)]
)
def test_tensor_core_linear_equals_its_plain_form(num_rows: int) -> None:
    x = e4m3(num_rows, 1024)
    for bias in (None, randn(512, seed=2)):
        arguments = (x, fp8_linear(512, 1024, 3e-4, bias), DTYPE)
        found = FORMS.tensor_core_linear(*arguments)
        assert relative_error(found, PLAIN.linear(*arguments)) < KERNEL_BF16


@pytest.mark.parametrize(
    "num_rows", [0, *(pytest.param(count, marks=BY_CUBLASLT) for count in (1, 8, 300))]
)
def test_logits_of_a_head_in_fp8_are_not_rounded(num_rows: int) -> None:
    """A step of chunks alone wants none."""
    arguments = (e4m3(num_rows, 1024), fp8_linear(512, 1024, 3e-4), torch.float32)
    found, expected = FORMS.linear(*arguments), PLAIN.linear(*arguments)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape == (num_rows, 512)
    if num_rows > 0:
        assert relative_error(found, expected) < KERNEL_BF16
        assert not torch.equal(found, found.bfloat16().float())
