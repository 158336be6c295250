"""The rendered repositories, parsed by Triton's own protobuf, against TensorRT-LLM's names, types
and shapes (tests/data/tensorrt_llm_triton.json), and the tensors its backend is given."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from frontends.triton.models.channel import to_request
from frontends.triton.program import Program
from frontends.triton.render import Form, ServeOptions, form_of, processes_of, render
from frontends.triton.request import read_request
from frontends.triton.server import Ports, server_command
from frontends.triton.signature import NVLM_INPUTS
from frontends.triton.tensorrt_llm import new_tokens, request_tensors
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderRequest
from runtime.engine.engine_dir import EngineDir
from runtime.requests.sampling import SETTINGS, SamplingParams
from tests.support.command import ROOT

MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_llm_triton.json").read_text())
FORMS: tuple[Form, ...] = ("torch", "tensorrt_llm")
# What a template of theirs leaves open, as this engine fills it.
TYPES = {
    "${logits_datatype}": "TYPE_FP32",
    "${prompt_embedding_table_data_type}": "TYPE_BF16",
    "${encoder_input_features_data_type}": "TYPE_BF16",
}


def repository(
    engine_dir: Path, folder: Path, form: Form, **options: Any
) -> dict[str, ModelConfig]:
    """The parsed config of every model."""
    render(EngineDir.read(engine_dir), folder, ServeOptions(form, **options))
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in sorted(folder.glob("*/config.pbtxt"))
    }


def tensors_of(specs: Any) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """name -> (type, dims, optional)"""
    return {
        spec.name: (
            DataType.Name(spec.data_type),
            tuple(spec.dims),
            getattr(spec, "optional", False),
        )
        for spec in specs
    }


def manifest_tensors(specs: list[dict[str, Any]]) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    return {
        spec["name"]: (
            TYPES.get(spec["data_type"], spec["data_type"]),
            tuple(spec["dims"]),
            spec.get("optional", False),
        )
        for spec in specs
    }


@pytest.mark.parametrize("form", FORMS)
def test_ensemble_has_the_signature_of_tensorrt_llms(
    engine_dir: Path, tmp_path: Path, form: Form
) -> None:
    config = repository(engine_dir, tmp_path, form)["ensemble"]
    assert tensors_of(config.input) == manifest_tensors(MANIFEST["ensemble"]["inputs"])
    assert tensors_of(config.output) == manifest_tensors(MANIFEST["ensemble"]["outputs"])


@pytest.mark.parametrize("form", FORMS)
def test_ensemble_hands_every_tensor_on_under_its_name(
    engine_dir: Path, tmp_path: Path, form: Form
) -> None:
    configs = repository(engine_dir, tmp_path, form)
    ensemble, nvlm = configs["ensemble"], configs["nvlm"]
    (step,) = ensemble.ensemble_scheduling.step
    assert step.model_name == "nvlm"
    for tensors, mapped, inner in (
        (ensemble.input, step.input_map, nvlm.input),
        (ensemble.output, step.output_map, nvlm.output),
    ):
        assert dict(mapped) == {tensor.name: tensor.name for tensor in tensors}
        assert tensors_of(tensors).items() <= tensors_of(inner).items()


def test_the_backend_has_the_signature_of_tensorrt_llms(engine_dir: Path, tmp_path: Path) -> None:
    config = repository(engine_dir, tmp_path, "tensorrt_llm")["tensorrt_llm"]
    theirs = MANIFEST["tensorrt_llm"]
    assert tensors_of(config.input) == manifest_tensors(theirs["inputs"])
    assert tensors_of(config.output) == manifest_tensors(theirs["outputs"])
    known = set(theirs["parameters_to_template_var"]) | set(theirs["fixed_parameters"])
    assert set(config.parameters) <= known
    engine = EngineDir.read(engine_dir)
    assert config.backend == "tensorrtllm"
    assert config.parameters["gpt_model_path"].string_value == str(engine_dir.resolve() / "llm")
    assert config.max_batch_size == engine.limits.max_batch_size
    assert config.model_transaction_policy.decoupled


def test_vision_takes_pixels(engine_dir: Path, tmp_path: Path) -> None:
    """As its executor does, and what `nvlm` sends of them."""
    vision = repository(engine_dir, tmp_path, "tensorrt_llm")["vision"]
    size = EngineDir.read(engine_dir).vision_config.image_size
    expected = {"tiles": ("TYPE_UINT8", (-1, size, size, 3), False)}
    assert tensors_of(vision.input) == expected
    tiles = torch.arange(size * size * 3).to(torch.uint8).view(1, size, size, 3)
    request = to_request("vision", {"tiles": tiles}, ("image_embeddings",))
    assert (request.inputs[0].datatype, *request.inputs[0].shape) == ("UINT8", *tiles.shape)
    assert request.raw_input_contents[0] == tiles.numpy().tobytes()


def test_vision_gives_what_the_backend_takes(engine_dir: Path, tmp_path: Path) -> None:
    configs = repository(engine_dir, tmp_path, "tensorrt_llm")
    (output,) = configs["vision"].output
    table = tensors_of(configs["tensorrt_llm"].input)["prompt_embedding_table"]
    assert DataType.Name(output.data_type) == table[0] == "TYPE_BF16"
    engine = EngineDir.read(engine_dir)
    hidden_size = engine.checkpoint_config.decoder.hidden_size
    assert list(output.dims) == [-1, engine.vision_config.tokens_per_tile, hidden_size]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_options_reach_the_models(
    engine_dir: Path, tmp_path: Path, form: Form, decoupled: bool
) -> None:
    folder = tmp_path / 'odd "name" \\ ünï'
    folder.mkdir()
    (link := folder / "engine").symlink_to(engine_dir)
    (models := folder / "models").mkdir()
    pipes = {model: folder / f"pipe_{model}" for model in processes_of(form)}
    configs = repository(
        link,
        models,
        form,
        max_queue_size=5,
        decoupled=decoupled,
        num_threads=3,
        hang_after_s=7.5,
        max_step_ms=25.0,
        pipes=pipes,
    )
    nvlm = configs["nvlm"]
    assert nvlm.model_transaction_policy.decoupled == decoupled
    parameters = {name: value.string_value for name, value in nvlm.parameters.items()}
    assert parameters == {
        "engine_dir": str(engine_dir.resolve()),
        "form": form,
        "hang_after_s": "7.5",
        "max_step_ms": "25.0",
        "pipe": str(pipes["nvlm"]),
        "device": "auto",
        "num_threads": "3",
        "max_queue_size": "5",
        "grpc_url": "127.0.0.1:8001",
    }
    expected = {"nvlm", "ensemble"} | ({"vision", "tensorrt_llm"} if form != "torch" else set())
    assert set(configs) == expected
    for config in configs.values():
        assert not config.instance_group or config.instance_group[0].kind == 2, "KIND_CPU"
    for path in models.glob("*/1/model.py"):
        compile(path.read_text(), str(path), "exec")


def test_the_form_follows_the_engine(engine_dir: Path) -> None:
    assert form_of(EngineDir.read(engine_dir)) == "torch"


def test_what_the_backend_is_given_agrees_with_the_manifest() -> None:
    """Every tensor of a request: known name, type, and a shape of batch 1."""
    specs = {spec["name"]: spec for spec in MANIFEST["tensorrt_llm"]["inputs"]}
    vocab_size, key_a, key_b = 100, bytes([1] * 32), bytes(8) + bytes([2] * 24)
    request = DecoderRequest(
        token_ids=[5, 100, 101, 6, 102, 7],
        max_new_tokens=9,
        prompt_table=torch.arange(12.0).reshape(3, 4),
        cache_keys=(key_a, key_b),
        rows_per_image=(2, 1),
        stop_ids=frozenset({9, 3}),
        sampling=SamplingParams(temperature=0.5, top_k=4, seed=2**63),
    )
    tensors = request_tensors(request, 9, vocab_size, torch.bfloat16)
    numpy_types = {"TYPE_INT32": "int32", "TYPE_FP32": "float32", "TYPE_UINT64": "uint64"}
    for name, value in tensors.items():
        spec = specs[name]
        dtype = str(value.dtype).removeprefix("torch.")
        expected = numpy_types | {"TYPE_BOOL": "bool"}
        assert dtype == expected.get(spec["data_type"], "bfloat16"), name
        assert value.shape[0] == 1, name
        dims = spec["dims"]
        assert len(value.shape) == 1 + len(dims), name
        for found, wanted in zip(value.shape[1:], dims, strict=True):
            assert wanted in (-1, found), name
    required = {name for name, spec in specs.items() if not spec["optional"]}
    assert required <= tensors.keys()

    def values(name: str) -> list[Any]:
        return list(np.asarray(tensors[name]).reshape(-1).tolist())

    one = int.from_bytes(bytes([1] * 8), "little")
    assert values("prompt_table_extra_ids") == [0, one, one, 0, 1, 0]
    assert values("prompt_vocab_size") == [3]
    assert values("input_lengths") == [6]
    assert values("request_output_len") == [9]
    assert values("end_id") == [3]
    assert values("runtime_top_k") == [4]
    assert values("runtime_top_p") == [1.0]
    assert values("seed") == [2**63]
    table = tensors["prompt_embedding_table"]
    assert isinstance(table, torch.Tensor)
    assert table.float().tolist() == [request.prompt_table.tolist()]  # type: ignore[union-attr]


def test_greedy_and_text_only_requests_send_no_more_than_they_need() -> None:
    tensors = request_tensors(DecoderRequest([1, 2], 3), 3, 100, torch.float16)
    assert tensors["runtime_top_k"].tolist() == [[1]]
    assert not tensors.keys() & {"seed", "temperature", "prompt_embedding_table"}
    assert tensors["end_id"].tolist() == [[-1]]


def test_new_tokens_end_at_the_sequence_length() -> None:
    outputs = {
        "output_ids": np.array([[[7, 8, 0, 0]]], np.int32),
        "sequence_length": np.array([[2]], np.int32),
    }
    assert new_tokens(outputs) == [(7, None), (8, None)]


def test_ranks_start_under_mpirun_as_tensorrt_llm_starts_them(tmp_path: Path) -> None:
    """Only written here: several ranks need several GPUs."""
    program = Program(Path("/opt/tritonserver/bin/tritonserver"), (), {})
    command = server_command(program, tmp_path, Ports(), "p_", world_size=2)
    assert command[:2] == ["mpirun", "--allow-run-as-root"]
    first, second = " ".join(command).split(" : ")
    for rank, text in enumerate((first, second)):
        assert "-n 1 /opt/tritonserver/bin/tritonserver" in text
        assert f"shm-region-prefix-name=p_{rank}_" in text
        assert f"--http-port={8000 + 10 * rank}" in text
    assert "--load-model" not in first
    assert "--model-control-mode=explicit --load-model=tensorrt_llm" in second


@pytest.mark.parametrize("name", ["image_bytes_input", "image_bytes", "image_base64"])
def test_images_are_counted_before_any_is_copied(engine_dir: Path, name: str) -> None:
    """3 GB, of which here is but one value."""
    one = np.uint8(0) if name == "image_bytes_input" else np.array(b"x" * 3_000_000, np.object_)
    shape = (1, 1000, 1000, 1000, 3) if name == "image_bytes_input" else (1, 1000)
    tensors = {
        "text_input": np.array([[b"x"]], np.object_),
        "max_tokens": np.array([[4]], np.int32),
        name: np.broadcast_to(one, shape),
    }
    limits = EngineDir.read(engine_dir).limits
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="has 1000 images, the engine takes 3"):
            read_request(tensors, limits)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_model_code_is_thin() -> None:
    """What runs in Triton calls `runtime`; it grows no logic of its own."""
    package = ROOT / "frontends" / "triton" / "models"
    lengths = {path.name: len(path.read_text().splitlines()) for path in package.glob("*.py")}
    assert max(lengths.values()) < 150, lengths


def test_every_input_is_read_or_refused() -> None:
    """No tensor of the signature is silently without effect but those that cannot have one."""
    package = ROOT / "frontends" / "triton"
    source = "".join((package / name).read_text() for name in ("request.py", "pictures.py"))
    names = {spec.name for spec in NVLM_INPUTS} - {setting.input_name for setting in SETTINGS}
    unread = {name for name in names if f'"{name}"' not in source}
    assert unread == {"pad_id", "prompt_table_extra_id", "length_penalty"}
