"""InternViT and projector against a float64 numpy model, and the ONNX export against torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from build.engines import vision_onnxruntime
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.inputs.tiling import normalize
from nvlm.model.vision import pixel_shuffle
from runtime.vision.onnxruntime_executor import OnnxRuntimeVisionExecutor
from runtime.vision.torch_executor import TorchVisionExecutor
from tests.conftest import BF16, CPU, FP32, TINY, Workshop
from tests.reference import internvit_float64
from tests.support.tolerances import (
    BF16_VISION,
    FLOAT16_VISION,
    FLOAT32_VISION,
    FP8_VISION,
    relative_error,
)

SHAPES = {
    "56px": TINY,
    "112px-5heads": replace(
        TINY, image_size=112, vision_hidden_size=80, vision_num_attention_heads=5
    ),
    "448px-1layer": replace(TINY, image_size=448, vision_num_hidden_layers=1),
}


def random_tiles(num_tiles: int, image_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tiles)
    return torch.randint(
        256, (num_tiles, image_size, image_size, 3), dtype=torch.uint8, generator=generator
    )


def encode(workshop: Workshop, name: str, precision: str, tiles: torch.Tensor) -> torch.Tensor:
    model_dir = workshop.model(f"vision-{name}", SHAPES[name])
    options = FP32 if precision == "float32" else BF16
    checkpoint = workshop.checkpoint(f"vision-{options.dtype}-{name}", model_dir, options)
    model = VisionCheckpoint.read(checkpoint / "vision").load(precision, CPU)
    return TorchVisionExecutor(model, max_num_tiles=7).encode(tiles)


def reference(model_dir: Path, tiles: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(internvit_float64.encode_tiles(model_dir, normalize(tiles).numpy()))


@pytest.mark.parametrize("name", SHAPES)
def test_embeddings_equal_the_float64_model_with_the_heads_as_stored(
    name: str, workshop: Workshop
) -> None:
    tiles = random_tiles(2, SHAPES[name].image_size)
    found = encode(workshop, name, "float32", tiles)
    expected = reference(workshop.root / f"vision-{name}", tiles)
    error = relative_error(found, expected)
    print(f"{name}: {error:.1e}")
    assert error <= FLOAT32_VISION


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bfloat16", BF16_VISION), ("float16", FLOAT16_VISION)]
)
def test_narrow_types_stay_close_to_float64(
    precision: str, tolerance: float, workshop: Workshop
) -> None:
    tiles = random_tiles(2, 56)
    found = encode(workshop, "56px", precision, tiles)
    expected = reference(workshop.root / "vision-56px", tiles)
    error = relative_error(found, expected)
    print(f"{precision}: {error:.1e}")
    assert found.dtype == getattr(torch, precision)
    assert error <= tolerance


def test_fp8_stays_close_to_float64_on_real_tiles(
    checkpoint_dir: Path, model_dir: Path, images: object
) -> None:
    from nvlm.inputs.images import load_image
    from nvlm.inputs.tiling import tile_image

    assert callable(images)
    image = load_image(images("landscape_800x450.png"))
    tiles = torch.from_numpy(tile_image(image, 56, 6).tiles)
    model = VisionCheckpoint.read(checkpoint_dir / "vision").load("FP8", CPU)
    found = TorchVisionExecutor(model, max_num_tiles=7).encode(tiles)
    expected = reference(model_dir, tiles)
    error = relative_error(found, expected)
    print(f"FP8: {error:.1e}")
    assert error <= FP8_VISION


def test_pixel_shuffle_puts_the_four_patches_of_a_cell_in_reading_order() -> None:
    side, channels = 6, 2
    x = torch.arange(side * side * channels).view(1, side, side, channels)
    out = pixel_shuffle(x)
    assert out.shape == (1, 3, 3, 4 * channels)
    for row, column in np.ndindex(3, 3):
        cell = [x[0, 2 * row + dy, 2 * column + dx] for dy in (0, 1) for dx in (0, 1)]
        assert torch.equal(out[0, row, column], torch.cat(cell))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("onnx")
    vision_onnxruntime.export_vision(
        VisionCheckpoint.read(checkpoint_dir / "vision"), "float32", directory
    )
    return directory / "model.onnx"


@pytest.mark.parametrize("num_tiles", [1, 2, 7, 20])
@pytest.mark.long
def test_onnx_equals_torch_for_any_number_of_tiles(
    num_tiles: int, exported: Path, checkpoint_dir: Path
) -> None:
    model = VisionCheckpoint.read(checkpoint_dir / "vision").load("float32", CPU)
    tiles = random_tiles(num_tiles, TINY.image_size)
    found = OnnxRuntimeVisionExecutor(exported, max_num_tiles=7).encode(tiles)
    expected = TorchVisionExecutor(model, max_num_tiles=7).encode(tiles)
    assert relative_error(found, expected) <= FLOAT32_VISION


@pytest.mark.long
def test_the_onnx_file_is_valid_and_its_tile_count_dynamic(exported: Path) -> None:
    onnx.checker.check_model(exported, full_check=True)
    graph = onnx.load(exported, load_external_data=False).graph
    assert [i.name for i in graph.input] == ["tiles"]
    assert [o.name for o in graph.output] == ["image_embeddings"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "num_tiles"
    assert not any(node.metadata_props for node in graph.node), "no name of a module of ours"


@pytest.mark.long
def test_an_export_that_computes_something_else_fails_loudly(
    tmp_path: Path, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is exported from a model whose class token is then changed."""
    save = torch.onnx.ONNXProgram.save
    checkpoint = VisionCheckpoint.read(checkpoint_dir / "vision")
    model = checkpoint.load("float32", CPU)
    monkeypatch.setattr(VisionCheckpoint, "load_plain", lambda *_: model)

    def save_and_change(program: torch.onnx.ONNXProgram, *args: object, **named: object) -> None:
        save(program, *args, **named)
        model.vision_model.embeddings.class_embedding.mul_(1.5)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save_and_change)
    with pytest.raises(vision_onnxruntime.ExportMismatchError, match="relative error"):
        vision_onnxruntime.export_vision(checkpoint, "float32", tmp_path)
