"""Unfinished and damaged checkpoint and engine directories, and limits that contradict them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from nvlm.formats import manifest
from tests.conftest import BF16, Workshop
from tests.support.command import BUILD, CONVERT, PLAIN, RUN, refused, run_command
from tests.support.damage import DAMAGES, Damage, cut, edit_json, sealed_again


@pytest.fixture
def own_checkpoint(checkpoint_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))


def build_refused(
    checkpoint_dir: Path, root: Path, *flags: object, fragments: tuple[str, ...] = ()
) -> str:
    where = ("--checkpoint_dir", checkpoint_dir, "--engine_dir", root / "new")
    return refused(root, BUILD, *where, "--vision", "torch", *flags, fragments=fragments)


@pytest.mark.parametrize(
    ("damage", "fragments"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_an_unfinished_or_damaged_checkpoint_is_refused(
    own_checkpoint: Path, tmp_path: Path, damage: Damage, fragments: tuple[str, ...]
) -> None:
    damage(own_checkpoint)
    build_refused(
        own_checkpoint, tmp_path, fragments=("checkpoint", *fragments, "convert_checkpoint.py")
    )


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_decoder_file_is_refused(
    own_checkpoint: Path, tmp_path: Path, kept: int
) -> None:
    weights = own_checkpoint / "rank0.safetensors"
    size = weights.stat().st_size
    cut(weights, kept % size)
    fragments = ("rank0.safetensors", f"{kept % size} bytes", str(size), "again")
    build_refused(own_checkpoint, tmp_path, fragments=fragments)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda d: cut(d / "rank0.safetensors", 9999), ("rank0.safetensors", "not a whole")),
        (
            lambda d: edit_json(d / "config.json", "intermediate_size", 64),
            ("rank0.safetensors", "[64, 128]", "asks for"),
        ),
        (lambda d: edit_json(d / "config.json", "vocab_size", ...), ("vocab_size is missing",)),
        (lambda d: edit_json(d / "config.json", "qwen_type", "qwen3"), ("'qwen3'", "'qwen2'")),
        (
            lambda d: edit_json(d / "config.json", "quantization.quant_algo", "INT8"),
            ("quantization.quant_algo", "'INT8'", "'FP8'"),
        ),
        (lambda d: (d / "config.json").unlink(), ("config.json does not exist",)),
        (lambda d: edit_json(d / "vision" / "config.json", "dtype", "int8"), ("'int8'",)),
        (lambda d: edit_json(d / "vision" / "config.json", "vision", ...), ("is missing",)),
        (lambda d: edit_json(d / "vision" / "config.json", "vision.x", 1), ("config.json",)),
        (lambda d: shutil.rmtree(d / "tokenizer"), ("tokenizer",)),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(
    own_checkpoint: Path, tmp_path: Path, damage: Damage, fragments: tuple[str, ...]
) -> None:
    damage(own_checkpoint)
    sealed_again(own_checkpoint)
    build_refused(own_checkpoint, tmp_path, fragments=fragments)


def test_a_checkpoint_dir_that_is_something_else_is_refused(
    model_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    fragments = ("does not exist", "convert_checkpoint.py")
    build_refused(tmp_path / "absent", tmp_path, fragments=fragments)
    build_refused(engine_dir, tmp_path, fragments=("'engine'", "'checkpoint'"))
    build_refused(model_dir / "config.json", tmp_path, fragments=("config.json",))


def published(root: Path, *paths: str) -> Path:
    """A folder with these files, empty."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.mark.parametrize(
    "paths",
    [
        ("config.json", "model.safetensors.index.json", "model-00001-of-00046.safetensors"),
        ("config.json", "model.safetensors"),
        ("config.json", "model-00001-of-00046.safetensors"),
        ("latest_checkpointed_iteration.txt",),
        ("iter_0001000/mp_rank_00/model_optim_rng.pt",),
        ("mp_rank_00_000/model_optim_rng.pt",),
    ],
    ids=lambda paths: paths[-1],
)
def test_a_model_as_published_is_named_as_one(tmp_path: Path, paths: tuple[str, ...]) -> None:
    """Hours of download: nobody is to delete them."""
    model = published(tmp_path / "model", *paths)
    convert = f"convert_checkpoint.py --model_dir {model}"
    for line in (
        build_refused(model, tmp_path, fragments=("not a checkpoint directory", convert)),
        run_refused(model, tmp_path, fragments=("not an engine directory", convert, "build_eng")),
    ):
        assert f"{model} is a model as published" in line
        assert "delete" not in line


def test_what_may_be_somebodys_own_is_not_to_go(tmp_path: Path) -> None:
    photos = published(tmp_path / "photos", "cat.jpg", "config.json")
    for line in (
        build_refused(photos, tmp_path, fragments=("not a finished checkpoint", "new directory")),
        run_refused(photos, tmp_path, fragments=("not a finished engine", "new directory")),
    ):
        assert "delete" not in line
    (photos / "manifest.json").write_text('{"manifest_version": 3}')
    assert "delete" not in build_refused(photos, tmp_path, fragments=("new directory",))


@pytest.mark.parametrize("damage", [row[1] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_the_advice_for_an_unfinished_or_damaged_directory_can_be_followed(
    model_dir: Path, own_checkpoint: Path, tmp_path: Path, damage: Damage
) -> None:
    """The line names a command; that command must not be refused in its turn."""
    damage(own_checkpoint)
    line = build_refused(own_checkpoint, tmp_path, fragments=("convert_checkpoint.py",))
    place = tmp_path / "fresh" if "new directory" in line else own_checkpoint
    flags = ["--overwrite"] if "--overwrite" in line else []
    where = ("--model_dir", model_dir, "--output_dir", place)
    result = run_command(CONVERT, *where, *PLAIN, *flags)
    assert result.exit_code == 0, f"{line}\nbut then {result.error}"


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--max_input_len", "10"), ("--max_input_len 10", "--max_num_images 1", "raise")),
        (("--max_input_len", "32768"), ("--max_input_len 32768", "--max_seq_len", "room")),
        (("--max_seq_len", "32769"), ("--max_seq_len 32769", "32768", "lower")),
        (("--max_seq_len", "999999999"), ("--max_seq_len 999999999", "32768", "lower")),
        (("--max_seq_len", "1"), ("--max_seq_len",)),
        (("--max_seq_len", "20"), ("--max_seq_len",)),
        (("--max_input_len", "2000", "--max_seq_len", "2000"), ("no room", "--max_seq_len")),
        (("--max_num_images", "9999"), ("--max_num_images 9999",)),
        (("--max_num_tokens", "100"), ("--max_num_tokens 100", "--max_input_len", "raise")),
        (("--max_batch_size", "0"), ("--max_batch_size", "'0'", "positive integer")),
        (("--max_num_images", "-1"), ("--max_num_images",)),
        (("--max_input_len", "0x40"), ("--max_input_len", "'0x40'")),
        (("--max_input", "2000"), ("--max_input",)),
        (("--decoder", "vllm"), ("--decoder", "'vllm'", "torch")),
        (("--vision", "openvino"), ("--vision", "'openvino'", "onnxruntime")),
        (("--vision_precision", "int8"), ("--vision_precision", "'int8'", "FP8")),
        (
            ("--vision", "onnxruntime", "--vision_precision", "FP8"),
            ("--vision_precision FP8", "onnxruntime", "--vision torch"),
        ),
        (
            ("--vision", "onnxruntime", "--vision_precision", "bfloat16"),
            ("--vision_precision bfloat16", "onnxruntime", "--vision torch"),
        ),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--m") else None,
)
def test_build_flags_that_contradict_the_model_are_refused(
    checkpoint_dir: Path, tmp_path: Path, flags: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    build_refused(checkpoint_dir, tmp_path, *flags, fragments=fragments)
    build_refused(checkpoint_dir, tmp_path, *flags, "--dry_run", fragments=fragments)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--compute_capability", "foo"), ("--compute_capability needs --vision tensorrt_rtx",)),
        (("--keep_onnx",), ("--keep_onnx needs --vision tensorrt or --vision tensorrt_rtx",)),
        (("--timing_cache", "t"), ("--timing_cache needs", "or --decoder tensorrt_llm")),
        (("--optimize_for", "throughput"), ("--optimize_for needs --decoder tensorrt_llm",)),
        (("--workers", "8"), ("--workers needs --decoder tensorrt_llm",)),
    ],
    ids=lambda value: value[0],
)
@pytest.mark.parametrize("vision", ["auto", "torch", "onnxruntime"])
def test_a_flag_that_the_targets_do_not_use_is_refused(
    checkpoint_dir: Path,
    tmp_path: Path,
    vision: str,
    flags: tuple[str, ...],
    fragments: tuple[str, ...],
) -> None:
    """`auto` is decided first: on a CPU it is ONNX Runtime."""
    resolved = "onnxruntime" if vision == "auto" else vision
    fragments = (*fragments, f"--decoder torch and --vision {resolved}; leave it out")
    flags = ("--vision", vision, "--device", "cpu", *flags)
    build_refused(checkpoint_dir, tmp_path, *flags, fragments=fragments)
    build_refused(checkpoint_dir, tmp_path, *flags, "--dry_run", fragments=fragments)


def test_advice_names_a_flag_that_was_given(checkpoint_dir: Path, tmp_path: Path) -> None:
    """With --max_seq_len 20 alone it is that flag which does not hold the image."""
    line = build_refused(checkpoint_dir, tmp_path, "--max_seq_len", "20")
    assert "--max_seq_len 20" in line, line


def test_fp8_vision_without_scales_is_refused(
    workshop: Workshop, model_dir: Path, tmp_path: Path
) -> None:
    checkpoint = workshop.checkpoint("checkpoint_bf16", model_dir, BF16)
    fragments = ("scales.safetensors", "--vision_precision FP8", "--quant_algo FP8")
    build_refused(checkpoint, tmp_path, "--vision_precision", "FP8", fragments=fragments)


@pytest.fixture
def own_engine(engine_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine_dir, tmp_path / "engine"))


def run_refused(engine_dir: Path, root: Path, *, fragments: tuple[str, ...]) -> str:
    flags = ("--engine_dir", engine_dir, "--device", "cpu", "--prompt", "hi")
    return refused(root, RUN, *flags, fragments=fragments)


@pytest.mark.parametrize(
    ("damage", "fragments"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_an_unfinished_or_damaged_engine_is_refused(
    own_engine: Path, tmp_path: Path, damage: Damage, fragments: tuple[str, ...]
) -> None:
    damage(own_engine)
    fragments = ("engine", *fragments, "build_engine.py")
    run_refused(own_engine, tmp_path, fragments=fragments)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda d: cut(d / "llm" / "rank0.safetensors", 9999), ("rank0", "not a whole")),
        (lambda d: cut(d / "vision" / "model.safetensors", 9999), ("model.safet", "not a whole")),
        (
            lambda d: edit_json(d / "llm" / "config.json", "build_config.target", "vllm"),
            ("'vllm'", "--decoder torch"),
        ),
        (
            lambda d: edit_json(d / "vision" / "config.json", "executor", "openvino"),
            ("'openvino'", "--vision"),
        ),
        (lambda d: edit_json(d / "vision" / "config.json", "precision", "int8"), ("'int8'",)),
        (lambda d: edit_json(d / "manifest.json", "limits.max_input_len", ...), ("max_input_len",)),
        (lambda d: edit_json(d / "manifest.json", "limits.x", 1), ("limits.x is 1", "absent")),
        (
            lambda d: edit_json(d / "manifest.json", "limits.max_input_len", 9000),
            ("limits.max_input_len is 9000, expected", "which it was built for"),
        ),
        (lambda d: edit_json(d / "manifest.json", "limits.max_seq_len", "4096"), ("'4096'",)),
        (
            lambda d: edit_json(d / "llm" / "config.json", "pretrained_config.vocab_size", 64),
            ("rank0", "asks for"),
        ),
        (lambda d: (d / "llm" / "config.json").unlink(), ("config.json does not exist",)),
    ],
)
def test_an_engine_that_contradicts_itself_is_refused(
    own_engine: Path, tmp_path: Path, damage: Damage, fragments: tuple[str, ...]
) -> None:
    damage(own_engine)
    sealed_again(own_engine)
    run_refused(own_engine, tmp_path, fragments=fragments)


def test_an_engine_dir_that_is_something_else_is_refused(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    fragments = ("absent does not exist", "build_engine.py --engine_dir")
    run_refused(tmp_path / "absent", tmp_path, fragments=fragments)
    run_refused(tmp_path, tmp_path, fragments=("not a finished engine", "build_engine.py"))
    run_refused(checkpoint_dir, tmp_path, fragments=("'checkpoint'", "'engine'"))


def test_manifests_of_damaged_directories_were_whole_before(
    checkpoint_dir: Path, engine_dir: Path
) -> None:
    """The refusals above are about the damage: unharmed, both directories pass."""
    for directory, kind in ((checkpoint_dir, "checkpoint"), (engine_dir, "engine")):
        found = manifest.verify_all(directory, kind)  # type: ignore[arg-type]
        assert asdict(found)["kind"] == kind
