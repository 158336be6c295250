"""Bad input to convert_checkpoint.py: one clear line, exit 2, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import (
    CONVERT,
    PLAIN,
    background,
    one_line_error,
    refused,
    run_command,
    run_process,
)
from tests.support.damage import Damage, cut, edit_json

INDEX = "model.safetensors.index.json"


@pytest.fixture
def own_model(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory the test may damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def convert_refused(
    model_dir: Path, root: Path, *flags: object, fragments: tuple[str, ...] = ()
) -> str:
    """Converts into `root / "new"`, which must not come to be, nor anything else below `root`."""
    flags = flags or PLAIN
    where = ("--model_dir", model_dir, "--output_dir", root / "new")
    return refused(root, CONVERT, *where, *flags, fragments=fragments)


def shard_of(model_dir: Path, name: str) -> Path:
    index = json.loads((model_dir / INDEX).read_text())
    return model_dir / str(index["weight_map"][name])


def edit_tensor(model_dir: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    """Replaces a tensor in its shard; None leaves it out."""
    path = shard_of(model_dir, name)
    tensors = load_file(path)
    changed = change(tensors.pop(name).clone())
    save_file(tensors if changed is None else {**tensors, name: changed}, path, {"format": "pt"})


def test_a_model_dir_that_is_missing_or_a_file_or_empty_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    convert_refused(tmp_path / "no", tmp_path, fragments=("--model_dir", "no is not a directory"))
    convert_refused(file, tmp_path, fragments=("--model_dir", "is not a directory"))
    convert_refused(empty, tmp_path, fragments=("no config.json", "NVLM-D", "--model_dir"))


def test_what_we_made_is_no_model(checkpoint_dir: Path, engine_dir: Path, tmp_path: Path) -> None:
    fragments = ("is a checkpoint directory already", "build_engine.py --checkpoint_dir")
    convert_refused(checkpoint_dir, tmp_path, fragments=fragments)
    fragments = ("is an engine directory", "run.py --engine_dir")
    convert_refused(engine_dir, tmp_path, fragments=fragments)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model_type": "NVLM_D"', "not valid JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b'"NVLM_D"', "expected an object"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b"\x00" * 100, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model_type": "NVLM_D", "x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}", "model_type is None, expected 'NVLM_D'"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:12]),
)
def test_a_config_that_is_no_json_object_is_refused(
    own_model: Path, tmp_path: Path, content: bytes, fragment: str
) -> None:
    (own_model / "config.json").write_bytes(content)
    convert_refused(own_model, tmp_path, fragments=("config.json", fragment))


@pytest.mark.parametrize(
    ("keys", "value", "fragments"),
    [
        ("model_type", "llama", ("'llama'", "'NVLM_D'", "not an NVLM-D checkpoint")),
        ("model_type", ["NVLM_D"], ("'NVLM_D'", "not an NVLM-D checkpoint")),
        ("ps_version", "v1", ("'v1'", "'v2'")),
        ("select_layer", -4, ("-4", "-1")),
        ("downsample_ratio", 1.0, ("1.0", "0.5")),
        ("use_thumbnail", False, ("False", "True")),
        ("force_image_size", 448, ("448", "56", "must be equal")),
        ("force_image_size", ..., ("is missing",)),
        ("max_dynamic_patch", 0, ("0", "positive integer")),
        ("llm_config", ..., ("is missing",)),
        ("llm_config", "Qwen2", ("'Qwen2'", "expected an object")),
        ("llm_config.architectures", ["LlamaForCausalLM"], ("Llama", "Qwen2ForCausalLM")),
        ("llm_config.hidden_act", "gelu", ("'gelu'", "'silu'")),
        ("llm_config.tie_word_embeddings", True, ("True", "False")),
        ("llm_config.use_sliding_window", True, ("True", "False")),
        ("llm_config.hidden_size", ..., ("is missing",)),
        ("llm_config.hidden_size", "128", ("'128'", "positive integer")),
        ("llm_config.hidden_size", 128.0, ("128.0", "positive integer")),
        ("llm_config.hidden_size", True, ("True", "positive integer")),
        ("llm_config.hidden_size", -128, ("-128", "positive integer")),
        ("llm_config.hidden_size", 130, ("130", "multiple of 8")),
        ("llm_config.num_hidden_layers", 0, ("0", "positive integer")),
        ("llm_config.vocab_size", None, ("None", "positive integer")),
        ("llm_config.rope_theta", 0, ("0", "positive number")),
        ("llm_config.rope_theta", float("nan"), ("nan", "positive number")),
        ("llm_config.rope_theta", float("inf"), ("inf", "positive number")),
        ("llm_config.rms_norm_eps", "1e-6", ("'1e-6'", "positive number")),
        ("vision_config", ..., ("is missing",)),
        ("vision_config.hidden_act", "relu", ("'relu'", "'gelu'")),
        ("vision_config.norm_type", "layer_norm", ("'layer_norm'", "'rms_norm'")),
        ("vision_config.qkv_bias", True, ("True", "False")),
        ("vision_config.qk_normalization", False, ("False", "True")),
        ("vision_config.num_channels", 1, ("1", "3")),
        ("vision_config.layer_norm_eps", ..., ("is missing",)),
    ],
)
def test_a_config_that_is_not_nvlm_d_is_refused_by_file_and_key(
    own_model: Path, tmp_path: Path, keys: str, value: object, fragments: tuple[str, ...]
) -> None:
    edit_json(own_model / "config.json", keys, value)
    convert_refused(own_model, tmp_path, fragments=("config.json", keys, *fragments))


@pytest.mark.parametrize(
    ("keys", "value", "fragments"),
    [
        ("llm_config.num_key_value_heads", 3, ("llm_config.num_attention_heads is 4", "of 3")),
        ("vision_config.num_attention_heads", 5, ("vision_config.hidden_size is 96", "of 5")),
        ("vision_config.patch_size", 16, ("vision_config.image_size is 56", "of 32")),
        ("vision_config.image_size", 70, ("70", "multiple of 28")),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    own_model: Path, tmp_path: Path, keys: str, value: int, fragments: tuple[str, ...]
) -> None:
    edit_json(own_model / "config.json", keys, value)
    convert_refused(own_model, tmp_path, fragments=("config.json", *fragments))


@pytest.mark.parametrize("section", ["llm_config", "vision_config"])
@pytest.mark.process
def test_a_number_of_layers_beyond_all_bounds_is_refused_at_once(
    own_model: Path, tmp_path: Path, section: str
) -> None:
    """Not after a list of their names has filled the memory."""
    edit_json(own_model / "config.json", f"{section}.num_hidden_layers", 10**9)
    where = ("--model_dir", own_model, "--output_dir", tmp_path / "new", *PLAIN)
    one_line_error(background(CONVERT, *where, log=tmp_path / "log").wait(8), "layers")


@pytest.mark.parametrize(
    ("weight_map", "fragments"),
    [
        ("absent.safetensors", ("absent.safetensors is missing", INDEX)),
        ("../model/config.json", (INDEX, "file names beside it")),
        ("/etc/passwd", (INDEX, "file names beside it")),
        ("..", ("missing", INDEX)),
        ("", ("missing", INDEX)),
        ("x" * 300, ("xxx", INDEX)),
        ("nul\0.safetensors", ("missing", INDEX)),
        ("config.json", ("config.json", "not a whole safetensors file")),
        (7, (INDEX, "file names beside it")),
    ],
)
def test_an_index_that_names_no_shard_beside_it_is_refused(
    own_model: Path, tmp_path: Path, weight_map: object, fragments: tuple[str, ...]
) -> None:
    index = json.loads((own_model / INDEX).read_text())
    index["weight_map"]["mlp1.0.weight"] = weight_map
    (own_model / INDEX).write_text(json.dumps(index))
    convert_refused(own_model, tmp_path, fragments=fragments)


@pytest.mark.parametrize(
    ("index", "fragments"),
    [
        ("{", (INDEX, "not valid JSON")),
        ("[]", (INDEX, "expected an object")),
        ("{}", (INDEX, "weight_map")),
        ('{"weight_map": []}', (INDEX, "weight_map")),
        ('{"weight_map": {}}', (INDEX, "tensor")),
        (None, (INDEX, "neither", "model.safetensors")),
    ],
)
def test_a_broken_or_missing_index_is_refused(
    own_model: Path, tmp_path: Path, index: str | None, fragments: tuple[str, ...]
) -> None:
    (own_model / INDEX).unlink()
    if index is not None:
        (own_model / INDEX).write_text(index)
    convert_refused(own_model, tmp_path, fragments=fragments)


def test_a_shard_that_is_missing_or_a_directory_is_refused(own_model: Path, tmp_path: Path) -> None:
    shard = shard_of(own_model, "mlp1.0.weight")
    shard.unlink()
    convert_refused(own_model, tmp_path, fragments=(shard.name, "is missing", INDEX))
    shard.mkdir()
    convert_refused(own_model, tmp_path, fragments=(shard.name, INDEX))


def header_bytes(shard: Path) -> int:
    """Length of the header and of the 8 bytes before it."""
    with open(shard, "rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


@pytest.mark.parametrize(
    "cut",
    [
        lambda shard: 0,
        lambda shard: 4,
        lambda shard: 8,
        lambda shard: header_bytes(shard) // 2,
        lambda shard: header_bytes(shard),
        lambda shard: header_bytes(shard) + 1000,
        lambda shard: shard.stat().st_size // 2,
        lambda shard: shard.stat().st_size - 1,
    ],
    ids=[
        "empty",
        "in_the_length",
        "after_the_length",
        "in_the_header",
        "after_the_header",
        "in_the_first_tensor",
        "half",
        "one_byte_short",
    ],
)
def test_a_shard_cut_short_is_refused_before_any_work(
    own_model: Path, tmp_path: Path, cut: Callable[[Path], int]
) -> None:
    shard = shard_of(own_model, "language_model.lm_head.weight")
    with open(shard, "rb+") as file:
        file.truncate(cut(shard))
    convert_refused(
        own_model, tmp_path, fragments=(shard.name, "not a whole safetensors file", "again")
    )


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 4998316088\n"
)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 4096,
        b"\x00" * 4096,
        LFS_POINTER,
        b"<!DOCTYPE html><html><head><title>404</title></head></html>",
        b"PK\x03\x04" + b"\x00" * 100,
        with_header(b"{" * 200),
        with_header(b'{"a": ' + b"\xff" * 50 + b"}"),
        with_header(b"[]      "),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0\0"),
        with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
        with_header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(
            b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', b"\0" * 4
        ),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_a_shard_that_is_not_safetensors_is_refused(
    own_model: Path, tmp_path: Path, content: bytes
) -> None:
    shard = shard_of(own_model, "mlp1.0.weight")
    shard.write_bytes(content)
    convert_refused(
        own_model, tmp_path, fragments=(shard.name, "not a whole safetensors file", "again")
    )


NAMES = (
    "vision_model.encoder.layers.1.attn.qkv.weight",
    "mlp1.3.weight",
    "language_model.model.layers.0.self_attn.k_proj.bias",
    "language_model.lm_head.weight",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_missing_from_its_shard_is_named(
    own_model: Path, tmp_path: Path, name: str
) -> None:
    shard = shard_of(own_model, name).name
    edit_tensor(own_model, name, lambda _: None)
    convert_refused(own_model, tmp_path, fragments=(shard, f"no tensor {name}"))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_missing_from_the_index_is_named(
    own_model: Path, tmp_path: Path, name: str
) -> None:
    index = json.loads((own_model / INDEX).read_text())
    del index["weight_map"][name]
    (own_model / INDEX).write_text(json.dumps(index))
    convert_refused(own_model, tmp_path, fragments=(INDEX, f"no tensor {name}"))


def test_a_tensor_missing_from_a_single_file_is_reported_of_that_file(
    own_model: Path, tmp_path: Path
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in own_model.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (own_model / INDEX).unlink()
    del tensors["mlp1.1.weight"]
    save_file(tensors, own_model / "model.safetensors")
    line = convert_refused(own_model, tmp_path, fragments=("no tensor mlp1.1.weight",))
    assert f"{own_model / 'model.safetensors'} " in line, "there is no index to complain about"


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("language_model.lm_head.weight", lambda t: t[:-1], "[511, 128]"),
        ("language_model.model.embed_tokens.weight", lambda t: t.T.contiguous(), "[128, 512]"),
        ("language_model.model.norm.weight", lambda t: t[None], "[1, 128]"),
        ("mlp1.0.bias", lambda t: t[:0], "[0]"),
        ("vision_model.encoder.layers.0.ls1", lambda t: t[0], "[]"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(
    own_model: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    found: str,
) -> None:
    expected = str(list(load_file(shard_of(own_model, name))[name].shape))
    edit_tensor(own_model, name, lambda t: change(t).clone())
    shard = shard_of(own_model, name).name
    convert_refused(
        own_model, tmp_path, fragments=(shard, f"{name} has shape {found}", f"asks for {expected}")
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_a_tensor_of_a_type_that_is_no_weight_is_named_with_the_types_that_are(
    own_model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = "mlp1.1.weight"
    edit_tensor(own_model, name, lambda t: t.to(dtype))
    shard = shard_of(own_model, name).name
    convert_refused(own_model, tmp_path, fragments=(shard, name, "expected one of F32"))


WEIGHTS = (
    "vision_model.embeddings.position_embedding",
    "vision_model.encoder.layers.1.attn.qkv.weight",
    "vision_model.encoder.layers.0.norm2.weight",
    "mlp1.3.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.1.self_attn.v_proj.bias",
    "language_model.model.layers.1.mlp.down_proj.weight",
    "language_model.model.norm.weight",
)


def with_last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (float("nan"), ("--calib_size", "1", "--device", "cpu")),
        (float("inf"), PLAIN),
        (float("-inf"), PLAIN),
    ],
    ids=["nan", "inf", "minus_inf"],
)
def test_a_weight_that_is_not_finite_names_its_tensor(
    own_model: Path, tmp_path: Path, name: str, value: float, flags: tuple[str, ...]
) -> None:
    edit_tensor(own_model, name, with_last(value))
    convert_refused(own_model, tmp_path, *flags, fragments=(name, "NaN or infinite", "again"))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_too_large_for_float16_names_its_tensor_and_wider_types(
    own_model: Path, tmp_path: Path, name: str
) -> None:
    edit_tensor(own_model, name, with_last(70000.0))
    fragments = (name, "float16", "--dtype bfloat16 or float32")
    convert_refused(own_model, tmp_path, "--dtype", "float16", *PLAIN, fragments=fragments)


def test_a_weight_too_large_for_bfloat16_is_not_sent_to_bfloat16(
    own_model: Path, tmp_path: Path
) -> None:
    name = "vision_model.encoder.layers.1.attn.qkv.weight"  # published as float32
    edit_tensor(own_model, name, with_last(3.4e38))
    line = convert_refused(own_model, tmp_path, fragments=(name, "overflows", "float32"))
    assert "--dtype bfloat16" not in line, "bfloat16 is what it does not fit"


def test_calibration_that_overflows_the_type_is_refused_not_turned_into_scales(
    own_model: Path, tmp_path: Path
) -> None:
    """Every weight fits float16, what they compute does not: no scale follows from that."""
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    edit_tensor(own_model, name, lambda t: t * 5e4)
    flags = ("--dtype", "float16", "--calib_size", "1", "--device", "cpu")
    convert_refused(own_model, tmp_path, *flags, fragments=("calibration", "--dtype"))


# The tokenizer.

TOKENIZER = "tokenizer.json"


def without_token(model_dir: Path, content: str) -> None:
    values = json.loads((model_dir / TOKENIZER).read_text())
    kept = [token for token in values["added_tokens"] if token["content"] != content]
    edit_json(model_dir / TOKENIZER, "added_tokens", kept)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda d: (d / TOKENIZER).unlink(), ("does not exist",)),
        (lambda d: (d / TOKENIZER).write_text("{"), ("not valid JSON",)),
        (lambda d: (d / TOKENIZER).write_text("[]"), ("expected an object",)),
        (lambda d: (d / TOKENIZER).write_text("{}"), ("Qwen2",)),
        (lambda d: edit_json(d / TOKENIZER, "model.type", "Unigram"), ("Qwen2",)),
        (lambda d: edit_json(d / TOKENIZER, "model", "BPE"), ("Qwen2",)),
        (lambda d: edit_json(d / TOKENIZER, "model", ...), ("Qwen2",)),
        (lambda d: edit_json(d / TOKENIZER, "model.vocab", ...), ()),
        (lambda d: edit_json(d / TOKENIZER, "model.vocab", []), ()),
        (lambda d: edit_json(d / TOKENIZER, "model.vocab.你", 399), ()),
        (lambda d: edit_json(d / TOKENIZER, "decoder", ["ByteLevel"]), ("Qwen2",)),
        (lambda d: edit_json(d / TOKENIZER, "decoder", None), ("Qwen2",)),
        (lambda d: edit_json(d / TOKENIZER, "added_tokens", {}), ("<|im_start|>",)),
        (lambda d: edit_json(d / TOKENIZER, "added_tokens", [{"id": 1}]), ()),
        (lambda d: edit_json(d / TOKENIZER, "added_tokens", [3]), ()),
        (lambda d: without_token(d, "<|im_start|>"), ("no token <|im_start|>", "NVLM-D")),
        (lambda d: without_token(d, "<|im_end|>"), ("no token <|im_end|>", "NVLM-D")),
    ],
)
def test_a_tokenizer_that_is_missing_or_not_qwen2_is_refused(
    own_model: Path, tmp_path: Path, damage: Damage, fragments: tuple[str, ...]
) -> None:
    damage(own_model)
    convert_refused(own_model, tmp_path, fragments=(TOKENIZER, *fragments))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    own_model: Path, tmp_path: Path
) -> None:
    values = json.loads((own_model / TOKENIZER).read_text())
    token = {**values["added_tokens"][-1], "content": "<extra>", "id": 512}
    edit_json(own_model / TOKENIZER, "added_tokens", [*values["added_tokens"], token])
    fragments = (TOKENIZER, "513 tokens", "512 embeddings", "belongs to the checkpoint")
    convert_refused(own_model, tmp_path, fragments=fragments)


# Calibration data.


def calibrated(*lines: str | dict[str, Any], folder: Path) -> tuple[object, ...]:
    path = folder / "calibration.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return ("--calib_data", path, "--device", "cpu")


GOOD = {"prompt": "What is it?"}


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("{", ("line 2",)),
        ("[" * 100_000, ("line 2",)),
        ("[]", ("line 2",)),
        ('"text"', ("line 2",)),
        ({"images": []}, ("line 2", "prompt")),
        ({"prompt": 3}, ("line 2", "prompt")),
        ({"prompt": None}, ("line 2", "prompt")),
        ({"prompt": "x", "images": None}, ("line 2",)),
        ({"prompt": "x", "images": "cat.png"}, ("line 2", "list")),
        ({"prompt": "x", "images": [1]}, ("line 2", "list")),
        ({"prompt": "x \udcff"}, ("line 2", "Unicode")),
        ({"prompt": "word " * 40_000}, ("line 2", "32768", "shorten")),
    ],
    ids=lambda value: None if isinstance(value, tuple) else repr(value)[:40],
)
def test_a_bad_calibration_line_is_refused_by_number(
    model_dir: Path, tmp_path: Path, line: str | dict[str, Any], fragments: tuple[str, ...]
) -> None:
    flags = calibrated(GOOD, line, folder=tmp_path)
    convert_refused(model_dir, tmp_path, *flags, fragments=("--calib_data", *fragments))


def test_calibration_data_that_holds_nothing_or_cannot_be_read_is_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    for flags in (calibrated(folder=tmp_path), calibrated(" ", "", folder=tmp_path)):
        convert_refused(model_dir, tmp_path, *flags, fragments=("--calib_data", "no samples"))
    (tmp_path / "latin1").write_bytes(b'{"prompt": "\xe9"}\n')
    for name in ("absent", "latin1"):
        flags = ("--calib_data", tmp_path / name)
        convert_refused(model_dir, tmp_path, *flags, fragments=("--calib_data", "cannot be read"))


@pytest.mark.parametrize("name", ["absent.png", "calibration.jsonl", ".", "nul\0.png"], ids=repr)
def test_calibration_images_that_cannot_be_read_are_skipped_and_counted(
    model_dir: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    unreadable = {"prompt": "x", "images": [name]}
    flags = calibrated(unreadable, GOOD, {**unreadable, "image": name}, folder=tmp_path)
    where = ("--model_dir", model_dir, "--output_dir", tmp_path / "new")
    assert run_command(CONVERT, *where, *flags).exit_code == 0
    assert "line 1 is skipped: image" in caplog.text
    report = json.loads((tmp_path / "new" / "quantization_report.json").read_text())
    assert (report["num_calibration_samples"], report["num_skipped"]) == (1, 2)


def test_calibration_data_of_which_no_image_can_be_read_is_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    flags = calibrated({"prompt": "x", "image": "absent.png"}, folder=tmp_path)
    fragments = ("--calib_data", "1 unreadable images and nothing else", "expected")
    convert_refused(model_dir, tmp_path, *flags, fragments=fragments)
    (tmp_path / "folder").mkdir()
    flags = ("--calib_data", tmp_path / "folder")
    convert_refused(model_dir, tmp_path, *flags, fragments=("--calib_data", "no samples"))
    (tmp_path / "folder" / "notes.md").write_text("no picture")
    convert_refused(model_dir, tmp_path, *flags, fragments=("1 unreadable images",))


def test_line_separators_inside_a_calibration_string_end_no_line(
    model_dir: Path, tmp_path: Path
) -> None:
    flags = calibrated('{"prompt": "one\u2028two\u0085three"}', folder=tmp_path)
    where = ("--model_dir", model_dir, "--output_dir", tmp_path / "new")
    assert run_command(CONVERT, *where, *flags).exit_code == 0


# Flags.


FIXES = re.compile(r"\b(expected|again|give|use|copy|download|choose)\b")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: shutil.rmtree(d),
        lambda d: (d / "config.json").write_text("{"),
        lambda d: edit_json(d / "config.json", "llm_config", ...),
        lambda d: edit_json(d / "config.json", "vision_config.hidden_size", ...),
        lambda d: (d / INDEX).write_text("{"),
        lambda d: (d / INDEX).write_text("{}"),
        lambda d: (d / INDEX).unlink(),
        lambda d: shard_of(d, "mlp1.0.weight").unlink(),
        lambda d: edit_tensor(d, "mlp1.0.weight", lambda _: None),
        lambda d: edit_tensor(d, "mlp1.0.weight", lambda t: t[:-1].clone()),
        lambda d: edit_json(d / INDEX, "weight_map", {}),
        lambda d: (d / TOKENIZER).unlink(),
        lambda d: (d / TOKENIZER).write_text("{"),
        lambda d: edit_json(d / TOKENIZER, "model.vocab", ...),
    ],
    ids=[
        "no_model_dir",
        "config_no_json",
        "config_without_section",
        "config_without_key",
        "index_no_json",
        "index_without_map",
        "no_index",
        "no_shard",
        "no_tensor_in_shard",
        "wrong_shape",
        "no_tensor_in_index",
        "no_tokenizer",
        "tokenizer_no_json",
        "tokenizer_without_vocabulary",
    ],
)
def test_a_refused_model_is_reported_with_what_was_expected_or_what_fixes_it(
    own_model: Path, tmp_path: Path, damage: Damage
) -> None:
    damage(own_model)
    line = convert_refused(own_model, tmp_path)
    assert FIXES.search(line), f"this says only what was found:\n{line}"


@pytest.mark.parametrize(
    "content", [None, "", "{}\n", "[]\n", "{\n", '{"prompt": "x", "images": 1}\n']
)
def test_refused_calibration_data_is_reported_with_what_was_expected_in_words(
    model_dir: Path, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "calibration.jsonl"
    if content is not None:
        path.write_text(content)
    line = convert_refused(model_dir, tmp_path, "--calib_data", path)
    assert FIXES.search(line), f"this says only what was found:\n{line}"
    assert "Error" not in line, f"the name of a Python exception helps no user:\n{line}"


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--unknown",), ("--unknown",)),
        (("--calib", "8"), ("--calib",)),
        (("--quant", "FP8"), ("--quant",)),
        (("stray",), ("stray",)),
        (("--quant_algo", "INT4"), ("--quant_algo", "'INT4'", "FP8")),
        (("--quant_algo", "fp8"), ("--quant_algo", "'fp8'", "FP8")),
        (("--kv_cache_quant_algo", "INT8"), ("--kv_cache_quant_algo", "'INT8'")),
        (("--dtype", "float8"), ("--dtype", "'float8'", "bfloat16")),
        (("--device", "tpu"), ("--device", "'tpu'", "cpu")),
        (("--calib_size", "0"), ("--calib_size", "'0'", "positive integer")),
        (("--calib_size", "-1"), ("--calib_size",)),
        (("--calib_size", "1.5"), ("--calib_size", "is '1.5', expected")),
        (("--calib_size", "many"), ("--calib_size", "'many'")),
        (("--calib_size", "++5"), ("--calib_size", "is '++5', expected a positive integer")),
        (("--calib_size",), ("--calib_size",)),
        (("--projector_norm_eps", "0"), ("--projector_norm_eps", "'0'", "positive number")),
        (("--projector_norm_eps", "nan"), ("--projector_norm_eps", "'nan'", "positive number")),
        (("--tokenizer_dir", "absent"), ("absent/tokenizer.json", "does not exist")),
        (("--dtype", "multi\nline"), ("--dtype", "bfloat16")),
    ],
    ids=" ".join,
)
def test_convert_flags_that_are_unknown_short_or_wrong_are_refused(
    model_dir: Path, tmp_path: Path, flags: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    convert_refused(model_dir, tmp_path, *flags, fragments=fragments)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        *(
            ((*PLAIN, f"--{name}", value), (f"--{name} needs --quant_algo FP8", "leave it out"))
            for name, value in (
                ("calib_cache", "absent"),
                ("calib_data", "absent"),
                ("calib_size", "16"),
            )
        ),
        (
            ("--calib_cache", "absent", "--calib_size", "16"),
            ("--calib_size needs a calibration", "--calib_cache takes the place"),
        ),
        (
            ("--calib_cache", "absent", "--calib_data", "absent"),
            ("--calib_data needs a calibration", "--calib_cache takes the place"),
        ),
    ],
    ids=" ".join,
)
def test_flags_of_a_calibration_that_does_not_happen_are_refused(
    model_dir: Path, tmp_path: Path, flags: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    convert_refused(model_dir, tmp_path, *flags, fragments=fragments)
    convert_refused(model_dir, tmp_path, *flags, "--dry_run", fragments=fragments)


def test_an_fp8_cache_alone_is_calibrated(model_dir: Path, tmp_path: Path) -> None:
    flags = (*PLAIN, "--kv_cache_quant_algo", "FP8", "--calib_size", "1")
    where = ("--model_dir", model_dir, "--output_dir", tmp_path / "new")
    assert run_command(CONVERT, *where, *flags).exit_code == 0


@pytest.mark.process
def test_a_real_process_refuses_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    """No log, no warning and no progress bar before a refusal that needs no work."""
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    shard = shard_of(model, "mlp1.0.weight")
    cut(shard, shard.stat().st_size - 1)
    where = ("--model_dir", model, "--output_dir", tmp_path / "new")
    result = run_process(CONVERT, *where)
    one_line_error(result, shard.name)
    assert result.stderr == result.error + "\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
