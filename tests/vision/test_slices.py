"""Where a pass of the vision encoder is cut, and that the cuts change no bit."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench.hopper.parts import load_vision
from bench.hopper.vision import random_tiles
from bench.synthetic_engine import synthetic_engine
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from runtime.vision.hopper_model import HopperVisionModel
from runtime.vision.kernels.plain_forms import PlainForms
from runtime.vision.slices import Slices
from runtime.vision.torch_executor import TorchVisionExecutor
from tests.conftest import BF16, CPU, HAS_HOPPER, TINY, Workshop

CUDA = torch.device("cuda")
NUM_LAYERS = 5
SLICE_MS = 10.0
MEASURED_AGAIN = 1.2  # clocks move, and slices were measured launch by launch
TILES = torch.randint(
    256, (3, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)

on_a_hopper_gpu = pytest.mark.skipif(not HAS_HOPPER, reason="CUDA graphs need a Hopper GPU")


@pytest.fixture(scope="module")
def deep(workshop: Workshop) -> VisionCheckpoint:
    """A checkpoint with `NUM_LAYERS` layers."""
    model_dir = workshop.model("vision-deep", replace(TINY, vision_num_hidden_layers=NUM_LAYERS))
    return VisionCheckpoint.read(
        workshop.checkpoint("vision-deep-bf16", model_dir, BF16) / "vision"
    )


class TestCut:
    def test_slices_take_as_many_layers_as_fit(self) -> None:
        assert Slices.of([2.0] * 7, 6.0) == Slices((3, 6), (6.0, 6.0, 2.0))

    def test_a_pass_that_fits_is_one_slice(self) -> None:
        assert Slices.of([2.0] * 3, 6.0) == Slices((), (6.0,))

    def test_a_layer_that_takes_longer_is_a_slice(self) -> None:
        assert Slices.of([5.0, 1.0, 5.0, 5.0, 1.0, 1.0], 3.0).ends == (1, 2, 3, 4)
        assert Slices.of([5.0], 3.0) == Slices((), (5.0,))

    def test_embedding_and_projector_count(self) -> None:
        """The first layer's time holds the embedding's, the last one's the projector's."""
        assert Slices.of([4.0, *[2.0] * 6, 5.0], 8.0).ends == (3, 7)

    @pytest.mark.parametrize("most_ms", [0.1, 1.0, 3.7, 10.0, 1e6])
    def test_every_layer_is_in_one_slice(self, most_ms: float) -> None:
        layer_ms = [1.0 + index % 3 for index in range(45)]
        slices = Slices.of(layer_ms, most_ms)
        bounds = [0, *slices.ends, len(layer_ms)]
        assert all(begin < end for begin, end in pairwise(bounds))
        assert slices.ms == tuple(sum(layer_ms[begin:end]) for begin, end in pairwise(bounds))
        assert max(slices.ms) <= max(most_ms, 3.0)

    def test_it_says_what_was_measured(self) -> None:
        assert str(Slices.of([2.0] * 7, 6.0)) == "3 (longest 6.0 of 14.0 ms)"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@torch.inference_mode()
def test_slices_of_every_size_give_the_bits_of_one_pass(
    deep: VisionCheckpoint, precision: str
) -> None:
    model = HopperVisionModel(deep.load(precision, CPU), PlainForms())
    assert model.num_layers == NUM_LAYERS
    expected = model(TILES)
    for size in range(1, NUM_LAYERS + 1):
        ends = range(size, NUM_LAYERS, size)
        slices = list(model.in_slices(TILES, ends))
        assert len(slices) == len(ends) + 1
        assert {tuple(hidden.shape) for hidden in slices[:-1]} <= {
            (3, deep.config.num_positions, deep.config.hidden_size)
        }
        assert torch.equal(slices[-1], expected), f"{size} layers a slice"


@torch.inference_mode()
def test_fp8_in_slices_gives_the_bits_of_one_pass(checkpoint_dir: Path) -> None:
    vision = VisionCheckpoint.read(checkpoint_dir / "vision").load("FP8", CPU)
    model = HopperVisionModel(vision, PlainForms())
    *_, embeddings = model.in_slices(TILES, range(1, model.num_layers))
    assert torch.equal(embeddings, model(TILES))


def test_a_cpu_has_no_slices(deep: VisionCheckpoint) -> None:
    whole, sliced = (
        TorchVisionExecutor(deep.load("bfloat16", CPU), 2, slice_ms=slice_ms)
        for slice_ms in (0.0, 1e-3)
    )
    sliced.warm_up()
    assert torch.equal(sliced.encode(TILES), whole.encode(TILES))


@pytest.mark.gpu
@pytest.mark.hopper
@on_a_hopper_gpu
@pytest.mark.parametrize("slice_ms", [1e-3, 0.2, 1e6], ids=["a layer each", "some", "one slice"])
def test_graphs_of_slices_give_the_bits_of_those_without(
    deep: VisionCheckpoint, slice_ms: float
) -> None:
    whole, sliced = (
        TorchVisionExecutor(deep.load("bfloat16", CUDA), 2, slice_ms=each)
        for each in (0.0, slice_ms)
    )
    for executor in (whole, sliced):
        executor.warm_up()
    for number in range(3):  # in passes of two tiles and of one
        tiles = TILES + number  # wraps around
        assert torch.equal(sliced.encode(tiles), whole.encode(tiles))


@pytest.mark.gpu
@pytest.mark.hopper
@on_a_hopper_gpu
@pytest.mark.parametrize("num_tiles", [1, 3, 7])
def test_a_slice_takes_no_longer_than_asked(
    num_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has the 72B model's size."""
    engine = synthetic_engine("72b", 1, max_batch_size=1, max_seq_len=64)
    executor = load_vision(engine, "FP8", CUDA, SLICE_MS)
    tiles = random_tiles(engine.vision_config, num_tiles, seed=0)
    executor.encode(tiles)  # captures

    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay(graph)
        end.record()
        events.append((begin, end))

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", timed)
    rounds = []
    for _ in range(5):
        executor.encode(tiles)
        torch.cuda.synchronize()
        rounds.append([begin.elapsed_time(end) for begin, end in events])
        events.clear()
    slices = [statistics.median(each) for each in zip(*rounds, strict=True)]
    print(f"{num_tiles} tiles: {', '.join(f'{ms:.2f}' for ms in slices)} ms")
    assert len(slices) >= sum(slices) / SLICE_MS / MEASURED_AGAIN
    assert max(slices) <= MEASURED_AGAIN * SLICE_MS
