"""What every `VisionExecutor` promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.vision.executor import VisionExecutor, create_vision_executor
from tests.doubles.cuda import STREAM
from tests.doubles.tensorrt_llm import installed

IMAGE_SIZE, TOKENS_PER_TILE, HIDDEN_SIZE = 56, 4, 128
MAX_NUM_TILES = 7  # six and a thumbnail


@dataclass(frozen=True, slots=True)
class Implementation:
    """tolerance: how far batching may move an embedding; 0.016 is bfloat16's step above 2.
    slice_ms: as of `create_vision_executor`.

    Torch on the machine of development moves none by a bit.
    """

    vision: str
    precision: str
    device: str
    tolerance: float
    slice_ms: float = 0.0


IMPLEMENTATIONS = {
    "torch float32": Implementation("torch", "float32", "cpu", 1e-5),
    "torch bfloat16": Implementation("torch", "bfloat16", "cpu", 0.02),
    "torch FP8": Implementation("torch", "FP8", "cpu", 0.05),
    "onnxruntime float32": Implementation("onnxruntime", "float32", "cpu", 1e-5),
    "TensorRT double float16": Implementation("tensorrt", "float16", "cuda", 0.01),
    "TensorRT double, slices": Implementation("tensorrt", "float16", "cuda", 0.01, 10.0),
    "torch bfloat16 cuda": Implementation("torch", "bfloat16", "cuda", 0.1),
    "torch FP8 cuda": Implementation("torch", "FP8", "cuda", 0.2),
    "torch FP8, slices, cuda": Implementation("torch", "FP8", "cuda", 0.2, 0.1),
}


def marks_of(made: Implementation, name: str) -> list[pytest.MarkDecorator]:
    if name.endswith("cuda"):
        return [pytest.mark.gpu]
    # The others build their engine in seconds.
    return [] if made.vision == "torch" else [pytest.mark.long]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(made, id=name, marks=marks_of(made, name))
        for name, made in IMPLEMENTATIONS.items()
    ],
)
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    made: Implementation = request.param
    if made.vision == "tensorrt":
        with installed(pytest.importorskip("tensorrt_rtx")):
            yield made
        return
    if made.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    if made.vision == "onnxruntime":
        pytest.importorskip("nvlm.program.onnxruntime_package")
    yield made


@pytest.fixture(scope="module")
def executor(
    implementation: Implementation, request: pytest.FixtureRequest, workshop: Any
) -> Iterator[VisionExecutor]:
    if implementation.vision == "onnxruntime":  # exporting takes seconds, so it is shared
        engine_dir = request.getfixturevalue("onnx_engine_dir")
    elif implementation.vision == "tensorrt":
        engine_dir = workshop.root / "engine_vision_tensorrt"
        options = BuildOptions(
            decoder="torch", vision="tensorrt", vision_precision="float16", max_batch_size=1
        )
        checkpoint_dir = request.getfixturevalue("checkpoint_dir")
        spec = specify(checkpoint_dir, options, torch.device("cuda"), 80 << 30)
        if not engine_dir.exists():
            build_engine(spec, engine_dir, options)
    else:
        engine_dir = workshop.engine(
            f"engine_vision_{implementation.precision}",
            request.getfixturevalue("checkpoint_dir"),
            vision=implementation.vision,
            vision_precision=implementation.precision,
        )
    engine = EngineDir.read(engine_dir)
    assert engine.vision_executor == implementation.vision
    assert engine.vision_precision == implementation.precision
    device = torch.device(implementation.device)
    executor = create_vision_executor(engine, device, implementation.slice_ms)
    yield executor
    executor.close()


def random_tiles(num_tiles: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        256, (num_tiles, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator
    )


def encode(executor: VisionExecutor, tiles: torch.Tensor) -> torch.Tensor:
    return executor.encode(tiles).cpu().float()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    difference = (found - expected).abs()
    where = torch.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= tolerance, (
        f"max {difference.max():.4g}, mean {difference.mean():.4g}, at {[int(i) for i in where]}"
    )


@pytest.mark.parametrize("num_tiles", [1, 2, MAX_NUM_TILES, MAX_NUM_TILES + 1, 2 * MAX_NUM_TILES])
def test_every_tile_gives_its_embeddings_finite_and_float(
    executor: VisionExecutor, num_tiles: int
) -> None:
    embeddings = executor.encode(random_tiles(num_tiles))
    assert embeddings.shape == (num_tiles, TOKENS_PER_TILE, HIDDEN_SIZE)
    assert embeddings.is_floating_point()
    assert embeddings.isfinite().all()


def test_one_pass_takes_the_tiles_of_the_largest_image(executor: VisionExecutor) -> None:
    assert executor.max_num_tiles == MAX_NUM_TILES


def test_embeddings_lie_on_the_executors_device(
    executor: VisionExecutor, implementation: Implementation
) -> None:
    assert executor.encode(random_tiles(1)).device.type == implementation.device


@pytest.mark.parametrize("num_tiles", [MAX_NUM_TILES, 2 * MAX_NUM_TILES + 1])
def test_many_tiles_whether_one_pass_or_several_equal_one_by_one(
    executor: VisionExecutor, implementation: Implementation, num_tiles: int
) -> None:
    tiles = random_tiles(num_tiles)
    single = torch.cat([encode(executor, tile[None]) for tile in tiles])
    assert_near(encode(executor, tiles), single, implementation.tolerance)


def test_tiles_differ_by_far_more_than_the_tolerance(
    executor: VisionExecutor, implementation: Implementation
) -> None:
    """Without this the tests that compare would pass for anything."""
    embeddings = encode(executor, random_tiles(2 * MAX_NUM_TILES + 1))
    for i in range(1, len(embeddings)):
        difference = (embeddings[i] - embeddings[:i]).abs().amax((1, 2))
        assert difference.min() > 4 * implementation.tolerance


def test_permuted_tiles_give_permuted_embeddings(
    executor: VisionExecutor, implementation: Implementation
) -> None:
    tiles = random_tiles(2 * MAX_NUM_TILES + 1)
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
    expected = encode(executor, tiles)[order]
    assert_near(encode(executor, tiles[order]), expected, implementation.tolerance)


def test_the_same_tiles_give_the_same_bits(executor: VisionExecutor) -> None:
    tiles = random_tiles(3)
    assert torch.equal(encode(executor, tiles), encode(executor, tiles))


def test_inputs_are_left_as_they_were(executor: VisionExecutor) -> None:
    tiles = random_tiles(MAX_NUM_TILES + 1)
    before = tiles.clone()
    executor.encode(tiles)
    assert torch.equal(tiles, before)


def test_strided_tiles_count_by_their_values(
    executor: VisionExecutor, implementation: Implementation
) -> None:
    """Channels first in memory, as models have them."""
    tiles = random_tiles(2)
    strided = tiles.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    assert_near(encode(executor, strided), encode(executor, tiles), implementation.tolerance)


@pytest.mark.parametrize(
    "shape",
    [
        (0, IMAGE_SIZE, IMAGE_SIZE, 3),
        (IMAGE_SIZE, IMAGE_SIZE, 3),
        (1, 1, IMAGE_SIZE, IMAGE_SIZE, 3),
        (1, IMAGE_SIZE, IMAGE_SIZE, 1),
        (1, IMAGE_SIZE, IMAGE_SIZE, 4),
        (1, IMAGE_SIZE + 14, IMAGE_SIZE + 14, 3),
        (1, IMAGE_SIZE, IMAGE_SIZE - 14, 3),
        (1, 3, IMAGE_SIZE, IMAGE_SIZE),
    ],
    ids=str,
)
def test_tiles_of_a_wrong_shape_or_none_are_refused_by_shape(
    executor: VisionExecutor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UserError, match=r"tiles have shape .*expected \[1 or more, 56, 56, 3\]"):
        executor.encode(torch.zeros(shape, dtype=torch.uint8))


def test_what_is_no_pixels_is_refused(executor: VisionExecutor) -> None:
    """Normalised tiles above all, which other interfaces take."""
    with pytest.raises(UserError, match=r"tiles are torch.float32, expected torch.uint8"):
        executor.encode(random_tiles(1).to(torch.float32))


@pytest.mark.long
@pytest.mark.parametrize(
    "implementation", [IMPLEMENTATIONS["TensorRT double, slices"]], indirect=True
)
def test_a_slice_of_tensorrt_is_a_tile_that_waits_for_the_one_before(
    executor: VisionExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int | str]()
    run = executor._run  # type: ignore[attr-defined]
    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(executor, "_run", lambda tiles: calls.append(len(tiles)) or run(tiles))
    executor.encode(random_tiles(3))
    assert calls == [1, "wait", 1, "wait", 1]


def test_refused_tiles_leave_the_executor_usable(executor: VisionExecutor) -> None:
    expected = encode(executor, random_tiles(1))
    with pytest.raises(UserError):
        executor.encode(torch.zeros(1, 1, 1, 3, dtype=torch.uint8))
    assert torch.equal(encode(executor, random_tiles(1)), expected)
