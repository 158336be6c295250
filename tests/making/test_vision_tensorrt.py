"""Vision engines really built, with TensorRT-RTX, and the numbers of the graphs they are made of.

TensorRT-RTX parses, types and compiles without a GPU, but runs none; numbers come from ONNX Runtime
on the same graphs in the types its CPU kernels take.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from build.engines.tensorrt_network import TensorrtBuildError
from build.engines.vision_onnx import export_graph, graph_module
from build.engines.vision_onnxruntime import compare_with_torch
from build.output.safetensors_writer import SafetensorsWriter
from nvlm.formats import layout
from nvlm.formats.checkpoint_tensors import vision_scales, vision_tensors
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.inputs.images import load_image
from nvlm.inputs.tiling import normalize, tile_image
from nvlm.model.config import TilingConfig, VisionConfig
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import fp8
from nvlm.model.vision import VisionModel, linear_of
from nvlm.program.errors import UserError
from nvlm.program.onnxruntime_package import onnxruntime
from runtime.engine.engine_dir import EngineDir
from tests.conftest import CPU, FP8, TINY, Workshop
from tests.support.cases import PHOTO
from tests.support.command import BUILD, one_line_error, refused, run_command
from tests.support.older_checkpoint import write_older_checkpoint
from tests.support.tolerances import FLOAT16_ONNX, FP8_ONNX, relative_error

ADA = "8.9"
INTERNVIT_WIDTH = VisionConfig(
    hidden_size=3200,
    intermediate_size=12800,
    num_hidden_layers=2,
    num_attention_heads=25,
    num_dummy_heads=0,
    image_size=448,
    patch_size=14,
    norm_eps=1e-6,
    projector_hidden_size=256,
    output_size=128,
)


@pytest.fixture(scope="module")
def vision(checkpoint_dir: Path) -> VisionCheckpoint:
    return VisionCheckpoint.read(checkpoint_dir / "vision")


@pytest.fixture(scope="module")
def tiles(vision: VisionCheckpoint) -> torch.Tensor:
    """Tiles of a photo: FP8 scales are calibrated on such."""
    return normalize(tile_image(load_image(PHOTO), vision.config.image_size, 6).tiles)


@pytest.fixture(scope="module")
def fp8_graph(tmp_path_factory: pytest.TempPathFactory, vision: VisionCheckpoint) -> Path:
    """Q/DQ around float32, which ONNX Runtime's CPU kernels run."""
    directory = tmp_path_factory.mktemp("fp8")
    return export_graph(graph_module(vision, "FP8", "float32"), vision.config.image_size, directory)


class TestGraphs:
    def test_the_fp8_graph_computes_what_torch_emulates(
        self, fp8_graph: Path, vision: VisionCheckpoint, tiles: torch.Tensor
    ) -> None:
        session = onnxruntime.InferenceSession(fp8_graph, providers=["CPUExecutionProvider"])
        emulated = _emulated_in_float32(vision)
        for num_tiles in (1, 2, 7):
            (found,) = session.run(None, {"tiles": tiles[:num_tiles].numpy()})
            with torch.inference_mode():
                expected = emulated(tiles[:num_tiles])
            error = relative_error(torch.from_numpy(found), expected)
            print(f"FP8 graph, {num_tiles} tiles: {error:.1e}")
            assert error <= FP8_ONNX

    def test_quantising_does_something_and_not_too_much(
        self, fp8_graph: Path, vision: VisionCheckpoint, tiles: torch.Tensor
    ) -> None:
        """Without this the test above would pass for a graph that quantises nothing."""
        session = onnxruntime.InferenceSession(fp8_graph, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"tiles": tiles.numpy()})
        with torch.inference_mode():
            exact = vision.load("float32", CPU)(tiles)
        assert 100 * FP8_ONNX < relative_error(torch.from_numpy(found), exact) < 0.05

    def test_only_the_four_linears_of_each_layer_are_quantised(self, fp8_graph: Path) -> None:
        graph = onnx.load(fp8_graph, load_external_data=False).graph
        scales = [n.input[1] for n in graph.node if n.op_type == "QuantizeLinear"]
        assert len(scales) == 4 * TINY.vision_num_hidden_layers
        weights = [i for i in graph.initializer if i.data_type == TensorProto.FLOAT8E4M3FN]
        names = sorted(i.name for i in weights if len(i.dims) == 2)
        assert names == sorted(
            f"vision_model.encoder.layers.{i}.{linear}.weight"
            for i in range(TINY.vision_num_hidden_layers)
            for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )

    def test_the_float16_graph_computes_what_torch_does(
        self, tmp_path: Path, vision: VisionCheckpoint
    ) -> None:
        """test_vision compares the float32 graph."""
        model = graph_module(vision, "float16", "float16")
        path = export_graph(model, vision.config.image_size, tmp_path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for num_tiles in (1, 2, 7):
            error = compare_with_torch(model, session, num_tiles)
            print(f"float16, {num_tiles} tiles: {error:.1e}")
            assert error <= FLOAT16_ONNX

    def test_a_graph_has_the_checkpoints_scales(self, vision: VisionCheckpoint) -> None:
        """And weights that are quantised with them."""
        model = graph_module(vision, "FP8", "bfloat16")
        emulated = vision.load("FP8", CPU)
        for name, scales in vision.read_scales(fp8.FP8).items():
            found = model.get_submodule(name)
            assert found.weight_scale.dtype == torch.bfloat16
            assert (found.weight_scale, found.activation_scale) == (
                scales.weight,
                scales.activation,
            )
            assert torch.equal(found.weight.float(), emulated.get_submodule(name).weight.float())

    def test_a_graph_of_float32_scales_is_quantised_with_what_they_become(
        self, fresh: Workshop, model_dir: Path
    ) -> None:
        """Both sides of the product agree, also for an older checkpoint."""
        older = write_older_checkpoint(model_dir, fresh.root / "older", FP8)
        vision = VisionCheckpoint.read(older / "vision")
        model = graph_module(vision, "FP8", "bfloat16")
        plain = vision.load_plain("bfloat16", CPU)
        for name, scales in vision.read_scales(fp8.FP8).items():
            found = model.get_submodule(name)
            assert float(found.weight_scale) == pytest.approx(scales.weight, rel=2**-8)
            expected = fp8.quantize(linear_of(plain, name).weight, found.weight_scale)
            assert torch.equal(found.weight.float(), expected.float())


class TestBuilds:
    """With the real builder."""

    @pytest.fixture(autouse=True)
    def rtx(self) -> None:
        pytest.importorskip("tensorrt_rtx")

    @pytest.mark.parametrize("precision", ["bfloat16", "float16", "FP8"])
    def test_the_command_builds_an_engine_for_any_number_of_tiles(
        self,
        workshop: Workshop,
        checkpoint_dir: Path,
        caplog: pytest.LogCaptureFixture,
        precision: str,
    ) -> None:
        path = workshop.root / f"engine_rtx_{precision}"
        result = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint_dir, "--engine_dir", path, "--device", "cpu"),
            *("--decoder", "torch", "--vision", "tensorrt_rtx", "--compute_capability", ADA),
            *("--vision_precision", precision),
            *(["--keep_onnx"] if precision == "FP8" else []),
        )
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
        engine = EngineDir.read(path)
        assert (engine.vision_executor, engine.vision_precision) == ("tensorrt_rtx", precision)
        assert engine.packages["compute_capability"] == ADA
        kept = ["model.onnx", "model.onnx.data"] if precision == "FP8" else []
        names = sorted(p.name for p in (path / "vision").iterdir())
        assert names == ["config.json", "model.engine", *kept, "summary.json"]
        summary = json.loads((path / "vision" / "summary.json").read_text())
        num_fp8 = 8 if precision == "FP8" else 0
        kind = "HALF" if precision == "float16" else "BF16"
        assert summary["num_fp8_products"] == num_fp8
        assert summary["network"].get("QUANTIZE FP8", 0) == num_fp8
        # Per layer q k v, scores, values, projection and two of the MLP; patches; projector.
        assert summary["network"][f"MATRIX_MULTIPLY {kind}"] == 2 * 6 + 1 + 2
        assert f"{num_fp8} FP8 products" in caplog.text, "the summary is printed"

    @pytest.mark.parametrize("precision", ["FP8", "bfloat16", "float16"])
    def test_internvit_builds_at_its_width(self, tmp_path: Path, precision: str) -> None:
        from build.engines.vision_tensorrt import TensorrtOptions, TileProfile, build_vision
        from nvlm.planning.tensorrt_package import load_tensorrt

        summary = build_vision(
            load_tensorrt("tensorrt_rtx"),
            _random_vision(INTERNVIT_WIDTH, tmp_path / "vision"),
            precision,
            TensorrtOptions(TileProfile(1, 7, 14), compute_capability=ADA),
            tmp_path,
        )
        is_fp8 = precision == "FP8"
        assert summary.num_fp8_products == (8 if is_fp8 else 0)
        num_weights = 2 * 3200 * (4 * 3200 + 2 * 12800)
        assert summary.engine_bytes > (1 if is_fp8 else 2) * num_weights

    def test_a_broken_graph_is_refused_by_the_name_of_its_node(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.onnx"
        _write_graph(path, node=helper.make_node("NoSuchOperator", ["tiles"], ["y"], name="broken"))
        with pytest.raises(TensorrtBuildError, match=r"node broken \(NoSuchOperator\)"):
            _build(path, tmp_path)

    def test_types_that_do_not_fit_are_refused_by_the_name_of_the_node(
        self, tmp_path: Path
    ) -> None:
        """A strongly typed network converts nothing by itself."""
        half = helper.make_tensor("half", TensorProto.FLOAT16, [1], [1.0])
        node = helper.make_node("Add", ["tiles", "half"], ["y"], name="mixed_types")
        path = tmp_path / "mixed.onnx"
        _write_graph(path, node=node, initializers=[half])
        with pytest.raises(TensorrtBuildError, match="mixed_types"):
            _build(path, tmp_path)

    def test_timings_of_an_earlier_build_are_read_by_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import tensorrt_rtx

        create, given = tensorrt_rtx.IBuilderConfig.create_timing_cache, []

        def recorded(config: object, data: bytes) -> object:
            given.append(data)
            return create(config, data)

        monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "create_timing_cache", recorded)
        path, cache = tmp_path / "negation.onnx", tmp_path / "timings" / "vision.cache"
        _write_graph(path, node=helper.make_node("Neg", ["tiles"], ["y"], name="negation"))
        _build(path, tmp_path, cache)
        written = cache.read_bytes()
        assert written
        _build(path, tmp_path, cache)
        assert given == [b"", written]

    def test_a_timing_cache_is_refused(self, checkpoint_dir: Path, tmp_path: Path) -> None:
        """It would change nothing: TensorRT-RTX chooses its kernels where the engine runs."""
        where = ("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "engine")
        rtx = ("--vision", "tensorrt_rtx", "--compute_capability", ADA, "--device", "cpu")
        flags = (*rtx, "--timing_cache", tmp_path / "timings")
        fragments = ("--timing_cache needs --vision tensorrt or", "--vision tensorrt_rtx")
        refused(tmp_path, BUILD, *where, *flags, fragments=fragments)

    def test_a_tensorrt_without_the_flag_builds_too(self, tmp_path: Path) -> None:
        """TensorRT 11 types every network strongly and may drop it."""
        import tensorrt_rtx

        from build.engines.tensorrt_network import parse_onnx
        from nvlm.planning.tensorrt_package import make_logger

        eleven = SimpleNamespace(
            NetworkDefinitionCreationFlag=object(),
            OnnxParser=tensorrt_rtx.OnnxParser,
        )
        path = tmp_path / "negation.onnx"
        _write_graph(path, node=helper.make_node("Neg", ["tiles"], ["y"], name="negation"))
        logger = make_logger(tensorrt_rtx)
        network = parse_onnx(eleven, tensorrt_rtx.Builder(logger), logger, path)
        assert network.num_outputs == 1

    def test_a_gpu_it_cannot_compile_for_is_refused(
        self, tmp_path: Path, checkpoint_dir: Path
    ) -> None:
        result = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "engine"),
            *("--device", "cpu", "--decoder", "torch", "--vision", "tensorrt_rtx"),
            *("--compute_capability", "9.0"),
        )
        one_line_error(result, "--compute_capability 9.0", "8.9", "12.0")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("capability", "precision", "least", "fixes"),
        [
            ("8.6", "FP8", "8.9", "bfloat16 or float16"),
            ("8.0", "FP8", "8.9", "bfloat16 or float16"),
            ("7.5", "FP8", "8.9", "float16"),
            ("7.5", "bfloat16", "8.0", "float16"),
            ("7.5", None, "8.0", "float16"),  # the checkpoint's own dtype
        ],
    )
    @pytest.mark.parametrize("dry_run", [(), ("--dry_run",)], ids=["build", "dry_run"])
    def test_a_gpu_without_the_type_is_refused_before_the_export(
        self,
        tmp_path: Path,
        checkpoint_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        dry_run: tuple[str, ...],
        capability: str,
        precision: str | None,
        least: str,
        fixes: str,
    ) -> None:
        monkeypatch.setattr(
            "build.engines.build.build_vision", lambda *_: pytest.fail("it was exported")
        )
        where = ("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "engine")
        rtx = ("--vision", "tensorrt_rtx", "--compute_capability", capability, "--device", "cpu")
        asked = ("--vision_precision", precision) if precision else ()
        message = (
            f"in {precision or 'bfloat16'} needs compute capability {least} or more",
            f"for {capability};",
            f"use --vision_precision {fixes}",
        )
        line = refused(tmp_path, BUILD, *where, *rtx, *asked, *dry_run, fragments=message)
        assert line.endswith(f"--vision_precision {fixes}")

    @pytest.mark.parametrize(
        ("capability", "precision"),
        [("8.9", "FP8"), ("12.0", "FP8"), ("8.0", "bfloat16"), ("7.5", "float16")],
    )
    def test_a_gpu_with_the_type_is_planned_for(
        self, tmp_path: Path, checkpoint_dir: Path, capability: str, precision: str
    ) -> None:
        result = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "engine"),
            *("--device", "cpu", "--vision", "tensorrt_rtx", "--vision_precision", precision),
            *("--compute_capability", capability, "--dry_run"),
        )
        assert result.exit_code == 0, result.stderr


def test_without_a_gpu_or_a_target_the_engine_is_refused(
    tmp_path: Path, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for vision, fragment in (("tensorrt", "--vision torch"), ("tensorrt_rtx", "--compute_cap")):
        result = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "engine"),
            *("--device", "cpu", "--vision", vision),
        )
        one_line_error(result, f"--vision {vision}", "torch sees", fragment)


def test_a_checkpoint_without_scales_builds_no_fp8_graph(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    """Conversion calibrates vision always; theirs may be from elsewhere."""
    shutil.copytree(checkpoint_dir / "vision", tmp_path / "vision")
    (tmp_path / "vision" / layout.SCALES).unlink()
    vision = VisionCheckpoint.read(tmp_path / "vision")
    with pytest.raises(UserError, match=r"no scales\.safetensors"):
        graph_module(vision, "FP8", "float32")


def _random_vision(config: VisionConfig, directory: Path) -> VisionCheckpoint:
    """Weights that are only there to be compiled."""
    directory.mkdir()
    tensors = vision_tensors(config, torch.bfloat16)
    pattern = 0.01 * torch.randn(65537, generator=torch.Generator().manual_seed(0)).bfloat16()
    with SafetensorsWriter(directory / layout.WEIGHTS, tensors) as writer:
        for index, (name, info) in enumerate(tensors.items()):
            num_values = math.prod(info.shape)
            rolled = pattern.roll(index)  # equal tensors would be stored once
            values = rolled.repeat(num_values // len(pattern) + 1)[:num_values]
            writer.write(name, values.view(info.shape))
    scales = vision_scales(config)
    with SafetensorsWriter(directory / layout.SCALES, scales) as writer:
        for name in scales:
            writer.write(name, torch.tensor([0.01]))
    return VisionCheckpoint(directory, "bfloat16", config, TilingConfig(config.image_size, 6))


def _emulated_in_float32(vision: VisionCheckpoint) -> VisionModel:
    """The torch emulation of FP8 with float32 around its linears."""
    model = vision.load_plain("float32", CPU)
    for name, scales in vision.read_scales(fp8.FP8).items():
        linear = linear_of(model, name)
        emulated = QuantizableLinear(
            fp8.quantize(linear.weight, scales.weight),
            linear.bias,
            number_format=fp8.FP8,
            scales=scales,
        )
        model.set_submodule(name, emulated)
    return model


def _write_graph(
    path: Path, node: onnx.NodeProto, initializers: list[onnx.TensorProto] | None = None
) -> None:
    shape = ["num_tiles", 3, 28, 28]
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("tiles", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers or [],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)


def _build(path: Path, directory: Path, timing_cache: Path | None = None) -> None:
    from build.engines.vision_tensorrt import TensorrtOptions, TileProfile, build_engine_from_onnx
    from nvlm.planning.tensorrt_package import load_tensorrt

    logging.getLogger("nvlm.planning.tensorrt_package").setLevel(logging.INFO)
    options = TensorrtOptions(TileProfile(1, 2, 4), ADA, timing_cache)
    build_engine_from_onnx(load_tensorrt("tensorrt_rtx"), path, options, directory)
