"""Bad Megatron checkpoints: one clear line, exit 2, nothing half-written, nothing executed."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from build.sources.megatron.source import MegatronSource
from tests.conftest import Workshop
from tests.reference.megatron_writer import Edit, Layout, write_megatron
from tests.support.command import CONVERT, PLAIN, refused
from tests.support.damage import Damage, cut
from tools.model_dir import Shape

SHAPE = Shape(
    vision_hidden_size=128,
    vision_num_attention_heads=1,
    vision_num_hidden_layers=1,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FILE = "model_optim_rng.pt"
QKV = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def hf_dir(workshop: Workshop) -> Path:
    return workshop.model("megatron_bad", SHAPE)


def convert_refused(
    megatron: Path, tokenizer_dir: Path, *flags: object, fragments: tuple[str, ...]
) -> str:
    """Refused, with `megatron` and everything beside it as before."""
    where = ("--model_dir", megatron, "--output_dir", megatron.parent / "new")
    tokenizer = ("--tokenizer_dir", tokenizer_dir)
    root = megatron.parent
    return refused(root, CONVERT, *where, *tokenizer, *(flags or PLAIN), fragments=fragments)


def rank(megatron: Path, tp: int = 0, pp: int | None = None, iteration: str = "1") -> Path:
    suffix = "" if pp is None else f"_{pp:03d}"
    return megatron / f"iter_{int(iteration):07d}" / f"mp_rank_{tp:02d}{suffix}" / FILE


# Ranks and folders.


@pytest.mark.parametrize(
    ("layout", "damage", "fragments"),
    [
        (Layout(2), lambda d: shutil.rmtree(rank(d, 0).parent), ("mp_rank_00", "missing", "2")),
        (
            Layout(4),
            lambda d: shutil.rmtree(rank(d, 3).parent),
            ("tensor_model_parallel_size is 4", "3", "copy all ranks"),
        ),
        (Layout(2), lambda d: rank(d, 1).unlink(), ("mp_rank_01", FILE, "missing", "copy")),
        (Layout(1, 2), lambda d: shutil.rmtree(rank(d, 0, 0).parent), ("mp_rank_00_000", "miss")),
        (
            Layout(1, 2),
            lambda d: shutil.rmtree(rank(d, 0, 1).parent),
            ("num_layers is 2", "hold 1 layers", "copy all ranks"),
        ),
        (Layout(2, 2), lambda d: shutil.rmtree(rank(d, 1, 0).parent), ("mp_rank_01_000", "miss")),
        (
            Layout(1),
            lambda d: shutil.copytree(rank(d).parent, rank(d, 1).parent),
            ("tensor_model_parallel_size is 1", "2 tensor-parallel ranks"),
        ),
        (
            Layout(2),
            lambda d: rank(d, 1).parent.rename(rank(d, 7).parent),
            ("mp_rank_01", "missing", "8 tensor-parallel"),
        ),
        (
            Layout(2),
            lambda d: rank(d, 1).parent.rename(rank(d, 1, 0).parent),
            ("mixes", "mp_rank_TT_PPP", "move"),
        ),
        (
            Layout(1),
            lambda d: rank(d).parent.rename(rank(d).parents[1] / "mp_rank_00_000_000"),
            ("mp_rank_00_000_000", "expert"),
        ),
        (
            Layout(1),
            lambda d: rank(d).parent.rename(rank(d).parents[1] / "mp_rank_0"),
            ("mp_rank_0 ", "expected mp_rank_TT"),
        ),
        (
            Layout(2),
            lambda d: rank(d, 1).parent.rename(rank(d).parents[1] / "mp_rank_001"),
            ("mp_rank_001 is not", "expected mp_rank_TT"),
        ),
        (
            Layout(2, 2),
            lambda d: exchange(rank(d, 0, 1), rank(d, 1, 1)),
            ("mp_rank_00_001", "by rank 3", "mp_rank_01_001", "by rank 2", "names Megatron gave"),
        ),
        (
            Layout(1, 2),
            lambda d: exchange(rank(d, 0, 0), rank(d, 0, 1)),
            ("mp_rank_00_000", "by rank 1", "mp_rank_00_001", "by rank 0", "names Megatron gave"),
        ),
        (
            Layout(2),
            lambda d: shutil.copy(rank(d, 0), rank(d, 1)),
            ("mp_rank_01", "the same language_model.decoder.layers.0", "mp_rank_00", "copy"),
        ),
        (
            Layout(2, 3, layers_per_stage=(0, 1, 1), embedding_stage=1),
            lambda d: shutil.copy(rank(d, 1, 0), rank(d, 0, 0)),
            ("mp_rank_01_000", "the same vision_model.decoder.layers.0", "mp_rank_00_000", "copy"),
        ),
        (
            Layout(1, 4, layers_per_stage=(0, 1, 1, 0)),
            lambda d: shutil.copy(rank(d, 0, 1), rank(d, 0, 2)),
            ("mp_rank_00_002", "the same language_model.decoder.layers.0", "mp_rank_00_001"),
        ),
        (
            Layout(1, 2),
            lambda d: shutil.copy(rank(d, 0, 1), rank(d, 0, 0)),
            ("no tensor vision_model", "expected the whole NVLM-D model"),
        ),
        (Layout(1), lambda d: shutil.rmtree(rank(d).parent), ("no mp_rank_* folders", "again")),
        (Layout(1), lambda d: shutil.rmtree(rank(d).parents[1]), ("iter_0000001", "not exist")),
        (Layout(1), lambda d: tracker(d, "abc"), ("'abc'", "'release'", "--model_dir")),
        (Layout(1), lambda d: tracker(d, ""), ("''", "number")),
        (Layout(1), lambda d: tracker(d, "-1"), ("'-1'", "number")),
        (Layout(1), lambda d: tracker(d, "../1"), ("'../1'", "number")),
        (Layout(1), lambda d: tracker(d, "2"), ("iteration 2", "iter_0000002 does not exist")),
        (Layout(1), lambda d: tracker(d, "release"), ("release does not exist",)),
        (Layout(1), lambda d: two_iterations(d), ("2 iterations", "--model_dir")),
        (Layout(1), lambda d: (d / "model.safetensors").touch(), ("safetensors", "one of them")),
    ],
)
def test_ranks_that_are_missing_or_misnamed_are_refused(
    tmp_path: Path, hf_dir: Path, layout: Layout, damage: Damage, fragments: tuple[str, ...]
) -> None:
    write_megatron(hf_dir, tmp_path / "megatron", layout)
    damage(tmp_path / "megatron")
    convert_refused(tmp_path / "megatron", hf_dir, fragments=fragments)


def tracker(megatron: Path, text: str) -> None:
    (megatron / "latest_checkpointed_iteration.txt").write_text(text)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    for old, new in ((one, aside), (other, one), (aside, other)):
        old.rename(new)


def two_iterations(megatron: Path) -> None:
    (megatron / "latest_checkpointed_iteration.txt").unlink()
    (megatron / "iter_0000002").mkdir()


@pytest.mark.parametrize(
    "files",
    [("metadata.json", "common.pt"), (".metadata", "__0_0.distcp"), ("__0_0.distcp",)],
    ids=["zarr", "torch_dist", "torch_dist_in_part"],
)
@pytest.mark.parametrize("is_iteration", [False, True])
def test_a_distributed_checkpoint_is_reported_with_how_to_become_a_plain_one(
    tmp_path: Path, hf_dir: Path, files: tuple[str, ...], is_iteration: bool
) -> None:
    folder = tmp_path / "megatron" / "iter_0000001"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    tracker(tmp_path / "megatron", "1")
    model_dir = folder if is_iteration else tmp_path / "megatron"
    convert_refused(
        model_dir,
        hf_dir,
        fragments=("distributed checkpoint", "torch_dist", "--ckpt-convert-format torch"),
    )


# The tokenizer.


def test_a_checkpoint_without_tokenizer_is_reported_with_where_to_get_it(
    tmp_path: Path, hf_dir: Path
) -> None:
    megatron = tmp_path / "megatron"
    write_megatron(hf_dir, megatron, Layout())
    fragments = ("tokenizer.json", "hf download nvidia/NVLM-D-72B", "--tokenizer_dir")
    where = ("--model_dir", megatron, "--output_dir", tmp_path / "new", *PLAIN)
    refused(tmp_path, CONVERT, *where, fragments=fragments)
    convert_refused(megatron, tmp_path / "absent", fragments=("absent", *fragments))
    for path in hf_dir.glob("tokenizer*"):
        shutil.copy(path, megatron)
    (megatron / "tokenizer.json").write_text("{}")
    convert_refused(megatron, megatron, fragments=("tokenizer.json", "Qwen2"))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path, hf_dir: Path) -> None:
    write_megatron(hf_dir, tmp_path / "megatron", Layout(2, vocab_rows=128))
    fragments = ("word_embeddings.weight", "128 rows", "tokens", "--tokenizer_dir")
    convert_refused(tmp_path / "megatron", hf_dir, fragments=fragments)


# What the ranks say of themselves and of each other.


def on(tp: int, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Changes the content of one tensor-parallel rank."""

    def edit(rank: int, _: int, content: dict[str, Any]) -> None:
        if rank == tp:
            change(content)

    return edit


def on_all(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda _tp, _pp, content: change(content) and None


def set_args(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: vars(content["args"]).update(values)


def set_model(name: str, change: Callable[[torch.Tensor], object]) -> Callable[..., object]:
    """None takes the tensor out."""

    def edit(content: dict[str, Any]) -> None:
        changed = change(content["model"].pop(name))
        if changed is not None:
            content["model"][name] = changed

    return edit


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


EMBEDDINGS = "language_model.embedding.word_embeddings.weight"
NORM = "language_model.decoder.final_layernorm.weight"
CONV = "vision_model.conv1.weight"


@pytest.mark.parametrize(
    ("edit", "fragments"),
    [
        (on(1, lambda c: c.update(iteration=2)), ("mp_rank_01", "iteration 2", "of 1", "copy")),
        (on(1, set_args(num_layers=3)), ("mp_rank_01", "num_layers is 3", "2", "one checkp")),
        (on(1, set_args(swiglu=False)), ("mp_rank_01", "swiglu", "one checkpoint")),
        (on_all(set_args(num_layers=3)), ("num_layers is 3", "hold 2", "copy")),
        (on_all(set_args(num_layers=10**12)), ("num_layers is 1000000000000", "hold 2")),
        (on_all(set_args(num_layers="2")), ("num_layers is '2'", "positive integer")),
        (on_all(set_args(num_layers=None)), ("num_layers is None",)),
        (on_all(set_args(num_layers=torch.ones(2))), ("num_layers is missing",)),
        (on_all(set_args(hidden_size=64)), ("kv_channels is 8", "expected 16")),
        (on_all(set_args(hidden_size=64, kv_channels=16)), ("shape [32, 16]", "[64, 16]")),
        (
            on_all(set_args(hidden_size=2**60, kv_channels=2**58)),
            ("args.hidden_size is 1152921504606846976",),
        ),
        (on_all(set_args(ffn_hidden_size=64)), ("shape", "args")),
        (on_all(set_args(ffn_hidden_size=33)), ("ffn_hidden_size is 33", "multiple of 2")),
        (on_all(set_args(num_attention_heads=8)), ("kv_channels is 8", "expected 4")),
        (on_all(set_args(num_attention_heads=3)), ("hidden_size is 32", "multiple of 6")),
        (on_all(set_args(num_query_groups=4)), (QKV, "shape", "[32, 32]", "[48, 32]")),
        (on_all(set_args(num_query_groups=1)), ("num_query_groups is 1", "multiple of 2")),
        (on_all(set_args(group_query_attention=False)), (QKV, "shape")),
        (on_all(set_args(normalization="LayerNorm")), ("'LayerNorm'", "'RMSNorm'")),
        (on_all(set_args(swiglu=False)), ("args.swiglu is False", "True")),
        (on_all(set_args(add_bias_linear=True)), ("add_bias_linear is True", "False")),
        (on_all(set_args(add_qkv_bias=False)), ("add_qkv_bias is False", "True")),
        (on_all(set_args(untie_embeddings_and_output_weights=False)), ("untie_emb", "True")),
        (on_all(set_args(position_embedding_type="mrope")), ("'mrope'", "'rope'")),
        (on_all(set_args(rotary_percent=0.5)), ("rotary_percent is 0.5", "1.0")),
        (on_all(set_args(apply_layernorm_1p=True)), ("apply_layernorm_1p is True",)),
        (on_all(set_args(num_experts=8)), ("num_experts is 8", "None")),
        (on_all(set_args(vision_model_type="clip")), ("'clip'", "'internvit'")),
        (on_all(lambda c: c.pop("args")), (FILE, "no Megatron arguments", "'args'")),
        (on_all(lambda c: c.update(args={"num_layers": 2})), ("no Megatron arguments",)),
        (on_all(lambda c: c.pop("model")), (FILE, "no 'model'", "again")),
        (on_all(lambda c: c.update(model=[1])), (FILE, "no 'model'")),
        (on_all(lambda c: c["model"].update({3: None})), (FILE, "no 'model' with named")),
        (on_all(lambda c: c.update(model0=c.pop("model"))), ("virtual pipeline", "save it")),
        (on_all(lambda c: c.update(checkpoint_version=1.0)), ("version 1.0", "3.0")),
        (on_all(lambda c: c.pop("checkpoint_version")), ("version None", "3.0")),
        (on(1, set_model(NORM, lambda t: None)), ("mp_rank_01", "no tensor", NORM, "copy")),
        (on_all(set_model(QKV, lambda t: None)), ("no tensor", QKV)),
        (on_all(set_model(CONV, lambda t: None)), ("no tensor", CONV, "NVLM-D")),
        (on_all(set_model(EMBEDDINGS, lambda t: None)), ("no tensor", EMBEDDINGS)),
        (on(1, set_model(QKV, lambda t: t[:-1])), ("mp_rank_01", QKV, "[31, 32]", "[32, 32]")),
        (on(1, set_model(QKV, lambda t: t.float())), ("mp_rank_01", QKV, "float32", "one type")),
        (on_all(set_model(QKV, lambda t: t.to(torch.float8_e4m3fn))), (QKV, "float8", "FP8")),
        (on_all(set_model(QKV, lambda t: t.to_sparse())), (QKV, "expected a tensor of float32")),
        (on_all(set_model(QKV, lambda t: t.to("meta"))), (QKV, "expected a tensor of float32")),
        (on_all(set_model(QKV, lambda t: "weight")), (QKV, "str", "expected a tensor")),
        (on_all(set_model(CONV, lambda t: t[:, 0])), ("no tensor", CONV, "4 dimensions")),
        (on_all(set_model(CONV, lambda t: t[:100])), ("100 channels", "heads of 128")),
        (on_all(set_model(CONV, lambda t: t[:0])), ("no tensor", CONV)),
        (
            on_all(set_model("vision_model.position_embeddings.weight", lambda t: t[:-1])),
            ("16 positions", "square", "NVLM-D"),
        ),
        (
            on_all(
                set_model(
                    "vision_model.decoder.layers.0.self_attention.q_layernorm.weight",
                    lambda t: t.repeat(5),
                )
            ),
            ("640 channels", "1 to 8", "one NVLM-D"),
        ),
    ],
)
def test_ranks_that_contradict_their_args_or_each_other_are_refused(
    tmp_path: Path, hf_dir: Path, edit: Edit, fragments: tuple[str, ...]
) -> None:
    write_megatron(hf_dir, tmp_path / "megatron", Layout(2), edit)
    convert_refused(tmp_path / "megatron", hf_dir, fragments=fragments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("theirs", "published"),
    [
        (QKV, "language_model.model.layers.0.self_attn.v_proj.weight"),
        (CONV, "vision_model.embeddings.patch_embedding.weight"),
        ("language_model.output_layer.weight", "language_model.lm_head.weight"),
    ],
)
def test_a_weight_that_is_no_number_is_reported_by_its_published_name(
    tmp_path: Path, hf_dir: Path, theirs: str, published: str, value: float
) -> None:
    edit = on_all(set_model(theirs, with_value(value)))
    write_megatron(hf_dir, tmp_path / "megatron", Layout(), edit)
    convert_refused(tmp_path / "megatron", hf_dir, fragments=(published, "NaN or infinite"))


# Damaged files.


def zipped_again(path: Path, change: Callable[[str, bytes], bytes], method: int) -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in entries.items():
            new.writestr(name, change(name, data))


def cut_pickle(path: Path, size: int) -> None:
    def change(name: str, data: bytes) -> bytes:
        return data[:size] if name.endswith("data.pkl") else data

    zipped_again(path, change, zipfile.ZIP_STORED)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: cut(path, 100),
        lambda path: cut(path, path.stat().st_size // 2),
        lambda path: cut(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        lambda path: path.write_bytes(pickle.dumps({"args": 1})),
        lambda path: cut_pickle(path, 0),
        lambda path: cut_pickle(path, 1000),
        lambda path: zipped_again(path, lambda _, data: data, zipfile.ZIP_DEFLATED),
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path),
        lambda path: torch.save({"weight": torch.ones(1)}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
        lambda path: torch.save({"a": 1}, path, pickle_protocol=4),
    ],
    ids=[
        *("empty", "start", "half", "last_byte", "lfs_pointer", "bare_pickle", "no_pickle"),
        *("half_pickle", "compressed", "torchscript", "state_dict", "list", "legacy", "protocol_4"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_that_is_cut_or_not_megatrons_is_refused(
    tmp_path: Path, hf_dir: Path, damage: Damage
) -> None:
    write_megatron(hf_dir, tmp_path / "megatron", Layout(2))
    damage(rank(tmp_path / "megatron", 1))
    convert_refused(
        tmp_path / "megatron", hf_dir, fragments=("mp_rank_01", FILE, "expected", "again")
    )


# Hostile pickles.


class Call:
    """Unpickled by an ordinary unpickler, it calls `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._reduced

    def __call__(self) -> None:
        """So that pickle takes it as a function."""


class Built:
    """Unpickled by an ordinary unpickler, it sets `state` on what `function` makes."""

    def __init__(self, state: Any, function: Any, *arguments: Any) -> None:
        self._reduced = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


TOUCH = "touch ran"  # the tests run in a directory of their own
OPEN = "open('ran', 'w')"

HOSTILE: dict[str, tuple[object, str]] = {
    "os_system": (Call(os.system, TOUCH), "posix.system"),
    "popen": (Call(subprocess.Popen, ["touch", "ran"]), ".Popen"),
    "eval": (Call(eval, OPEN), "builtins.eval"),
    "exec": (Call(exec, OPEN), "builtins.exec"),
    "open": (Call(open, "ran", "w"), "io.open"),
    "import": (Call(builtins.__import__, "os"), "builtins.__import__"),
    "import_module": (Call(importlib.import_module, "antigravity"), "importlib.import_module"),
    "nested_pickle": (Call(pickle.loads, pickle.dumps(Call(eval, OPEN))), "pickle.loads"),
    "partial": (Call(functools.partial(os.system, TOUCH)), "functools.partial"),
    "reduce": (Call(functools.reduce, os.system, [TOUCH]), "functools.reduce"),
    "map": (Call(list, Call(map, eval, [OPEN])), "builtins.eval"),
    "methodcaller": (Call(operator.methodcaller("unlink"), Path("x")), "operator.methodcaller"),
    "getattr_of_a_module": (
        Call(Call(getattr, Call(importlib.import_module, "os"), "system"), TOUCH),
        "importlib.import_module",
    ),
    "getattr": (Call(getattr, torch.Tensor, "__init__"), "builtins.getattr"),
    "instance_called": (Call(Call(torch.Size, (1,)), OPEN), "more than name tensors"),
    "torch_load": (Call(torch.load, "ran"), "torch.serialization.load"),
    "torch_hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "unpickler_class": (Call(pickle.Unpickler, Call(io.BytesIO, b"")), "pickle.Unpickler"),
    "path_unlink": (Call(Path.unlink, Call(str, "x")), "pathlib"),
    "state_of_a_function": (Built({"x": 1}, os.system, TOUCH), "posix.system"),
    "state_with_slots": (
        Built((None, {"__class__": 1, "__call__": Call(os.system, TOUCH)}), torch.Size, (1,)),
        "posix.system",
    ),
}


def somewhere(place: str, evil: object) -> Edit:
    def edit(tp: int, _: int, content: dict[str, Any]) -> None:
        if tp != 1:
            return
        if place == "args":
            content["args"].evil = evil
        elif place == "extra_state":
            content["model"]["language_model.output_layer._extra_state"] = evil
        else:
            content["optimizer"]["state"][0] = [{"deep": (evil,)}]

    return edit


@pytest.mark.parametrize("place", ["args", "extra_state", "optimizer"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    evil, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    write_megatron(hf_dir, tmp_path / "megatron", Layout(2), somewhere(place, evil))
    convert_refused(tmp_path / "megatron", hf_dir, fragments=("mp_rank_01", FILE, message))
    assert not Path("ran").exists()


@pytest.mark.process
def test_those_pickles_are_hostile_to_an_ordinary_unpickler(
    tmp_path: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test before this one would show nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("os_system", "popen", "eval", "nested_pickle", "partial", "getattr_of_a_module"):
        evil, _ = HOSTILE[name]
        made = pickle.loads(pickle.dumps(evil))
        if isinstance(made, subprocess.Popen):
            made.wait()
        assert Path("ran").exists(), name
        Path("ran").unlink()


def test_a_class_that_calls_itself_megatrons_runs_nothing(
    tmp_path: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name whose every import leaves a trace: it is not even looked up."""
    package = tmp_path / "installed" / "megatron"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef run(*_): pass\n"
    )
    write_megatron(hf_dir, tmp_path / "megatron", Layout(2))

    def renamed(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        return data.replace(b"cmegatron.core.enums\nModelType\n", b"cmegatron\nrun\n")

    path = rank(tmp_path / "megatron", 1)
    zipped_again(path, renamed, zipfile.ZIP_STORED)
    assert b"cmegatron\nrun\n" in path.read_bytes()
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    MegatronSource(tmp_path / "megatron", tokenizer_dir=hf_dir)
    assert not (tmp_path / "ran").exists()
