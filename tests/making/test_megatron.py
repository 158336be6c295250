"""Weights from Megatron-Core's layout: row orders, every TP and PP, configuration, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from build.sources.detect import open_source
from build.sources.hugging_face import HuggingFaceSource
from build.sources.megatron.model_config import model_config
from build.sources.megatron.rank_file import RankFile
from build.sources.megatron.source import MegatronSource
from build.sources.megatron.tensors import megatron_tensors
from nvlm.formats.tensor_names import EMBED_TOKENS, LM_HEAD, model_tensors
from nvlm.model.config import NVLMConfig
from tests.conftest import Workshop
from tests.reference import megatron_writer
from tests.reference.megatron_writer import Edit, Layout, write_megatron
from tests.support.command import CONVERT, PLAIN, ROOT, run_command, tree
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import Shape, config_json

SHAPE = Shape(
    vision_hidden_size=256,
    vision_num_attention_heads=2,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
)
"""Divides by 8 tensor-parallel and 4 pipeline ranks; Megatron pads its 2 vision heads to 4 or 8."""

RANKS = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4)]

# Goldens, written by hand. Each rank's rows hold their own number, so what is read names the rows.

GOLDEN = Shape(
    vision_hidden_size=128,
    vision_num_attention_heads=1,
    vision_num_hidden_layers=1,
    hidden_size=8,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DECODER = "language_model.model.layers.0."
MEGATRON_DECODER = "language_model.decoder.layers.0."
VISION = "vision_model.encoder.layers.0."
MEGATRON_VISION = "vision_model.decoder.layers.0."


def numbered(name: str, axis: int = 0) -> Edit:
    """Fills a tensor with the numbers of its rows (columns), 1000 more on each further rank."""

    def edit(tp: int, _: int, content: dict[str, Any]) -> None:
        shape = content["model"][name].shape
        numbers = 1000.0 * tp + torch.arange(shape[axis], dtype=torch.float32)
        along = [-1 if i == axis else 1 for i in range(len(shape))]
        content["model"][name] = numbers.view(along).expand(shape).contiguous()

    return edit


def read_numbers(
    fresh: Workshop, shape: Shape, tp_size: int, edit: Edit, name: str, axis: int = 0
) -> list[int]:
    model_dir = fresh.model("hf", shape)
    write_megatron(model_dir, fresh.root / "megatron", Layout(tp_size), edit)
    source = MegatronSource(fresh.root / "megatron", tokenizer_dir=model_dir)
    tensor = source.read(name)
    numbers = tensor if tensor.dim() == 1 else tensor.select(1 - axis, 0)
    assert torch.equal(
        tensor,
        numbers.view_as(tensor)
        if tensor.dim() == 1
        else numbers.unsqueeze(1 - axis).expand_as(tensor),
    )
    return [int(n) for n in numbers]


# Two query groups of two query heads, head_dim 2. A group's rows: q q q q k k v v.
_Q_OF_TWO_GROUPS = {1: [0, 1, 2, 3, 8, 9, 10, 11], 2: [0, 1, 2, 3, 1000, 1001, 1002, 1003]}
_K_OF_TWO_GROUPS = {1: [4, 5, 12, 13], 2: [4, 5, 1004, 1005]}
_V_OF_TWO_GROUPS = {1: [6, 7, 14, 15], 2: [6, 7, 1006, 1007]}


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("part", "rows"), [("q", _Q_OF_TWO_GROUPS), ("k", _K_OF_TWO_GROUPS), ("v", _V_OF_TWO_GROUPS)]
)
def test_q_k_and_v_are_taken_from_each_query_group(
    fresh: Workshop, part: str, rows: dict[int, list[int]], tp_size: int, kind: str
) -> None:
    edit = numbered(f"{MEGATRON_DECODER}self_attention.linear_qkv.{kind}")
    name = f"{DECODER}self_attn.{part}_proj.{kind}"
    assert read_numbers(fresh, GOLDEN, tp_size, edit, name) == rows[tp_size]


@pytest.mark.parametrize(
    ("tp_size", "part", "rows"),
    [
        (1, "gate", [0, 1, 2, 3]),
        (1, "up", [4, 5, 6, 7]),
        (2, "gate", [0, 1, 1000, 1001]),
        (2, "up", [2, 3, 1002, 1003]),
    ],
)
def test_gate_and_up_are_the_halves_of_each_rank(
    fresh: Workshop, tp_size: int, part: str, rows: list[int]
) -> None:
    edit = numbered(f"{MEGATRON_DECODER}mlp.linear_fc1.weight")
    name = f"{DECODER}mlp.{part}_proj.weight"
    assert read_numbers(fresh, GOLDEN, tp_size, edit, name) == rows


def test_q_k_and_v_of_one_vision_head_stand_after_one_another(fresh: Workshop) -> None:
    """Megatron: q, k, v of the head, 128 rows each. Published: 1 + 7 heads of q, of k, of v."""
    edit = numbered(f"{MEGATRON_VISION}self_attention.linear_qkv.weight")
    rows = read_numbers(fresh, GOLDEN, 1, edit, f"{VISION}attn.qkv.weight")
    dummies = [0] * (7 * 128)
    q, k, v = [*range(128)], [*range(128, 256)], [*range(256, 384)]
    assert rows == q + dummies + k + dummies + v + dummies


def test_vision_heads_of_two_ranks_are_sorted_into_q_k_and_v(fresh: Workshop) -> None:
    shape = replace(GOLDEN, vision_hidden_size=256, vision_num_attention_heads=2)
    edit = numbered(f"{MEGATRON_VISION}self_attention.linear_qkv.weight")
    rows = read_numbers(fresh, shape, 2, edit, f"{VISION}attn.qkv.weight")
    starts = rows[::128]  # of each block of a head
    assert starts == [0, 1000, *[0] * 7, 128, 1128, *[0] * 7, 256, 1256, *[0] * 7]
    assert rows[1152 : 1152 + 130] == [*range(128, 256), 1128, 1129]


@pytest.mark.parametrize(
    ("theirs", "ours", "axis", "numbers"),
    [
        (f"{MEGATRON_DECODER}self_attention.linear_proj.weight", "self_attn.o_proj", 1, 4),
        (f"{MEGATRON_DECODER}mlp.linear_fc2.weight", "mlp.down_proj", 1, 2),
    ],
)
def test_row_parallel_columns_follow_the_ranks(
    fresh: Workshop, theirs: str, ours: str, axis: int, numbers: int
) -> None:
    found = read_numbers(fresh, GOLDEN, 2, numbered(theirs, axis), f"{DECODER}{ours}.weight", axis)
    assert found == [*range(numbers), *range(1000, 1000 + numbers)]


def test_the_vocabulary_follows_the_ranks_and_loses_megatrons_padding(fresh: Workshop) -> None:
    """512 embeddings in Hugging Face's, padded by Megatron to 1,024 on 8 ranks."""
    shape = replace(SHAPE, num_hidden_layers=1)
    edit = numbered("language_model.embedding.word_embeddings.weight")
    found = read_numbers(fresh, shape, 8, edit, EMBED_TOKENS)
    assert found == [1000 * tp + row for tp in range(4) for row in range(128)]


def test_a_vocabulary_short_of_the_published_one_is_padded_with_its_last_row(
    fresh: Workshop,
) -> None:
    model_dir = fresh.model("hf", GOLDEN)
    write_megatron(model_dir, fresh.root / "megatron", Layout(2, vocab_rows=430))
    source = MegatronSource(fresh.root / "megatron", tokenizer_dir=model_dir)
    whole = HuggingFaceSource(model_dir)
    for name in (EMBED_TOKENS, LM_HEAD):
        found, expected = source.read(name), whole.read(name)
        assert torch.equal(found[:430], expected[:430])
        assert torch.equal(found[430:], expected[429:430].expand(82, -1))


def test_the_writer_has_the_row_orders_written_by_hand() -> None:
    """Published rows: q 0-7, k 8-11, v 12-15; two groups. And 2 stored vision heads of dim 1."""
    assert megatron_writer.decoder_qkv_order(4, 2, 2) == [
        *(0, 1, 2, 3, 8, 9, 12, 13),
        *(4, 5, 6, 7, 10, 11, 14, 15),
    ]
    assert megatron_writer.vision_qkv_order([0, 1], 2, 1) == [0, 2, 4, 1, 3, 5]


# The table, against facts of the 72B model.


def config_72b() -> NVLMConfig:
    return NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))


def stored_72b(tp_size: int) -> NVLMConfig:
    """25, 26, 28 or 32 heads; 151,646 tokens padded to a multiple of 128 times the ranks."""
    config = config_72b()
    num_rows = {1: 151680, 2: 151808, 4: 152064, 8: 152576}[tp_size]
    return replace(
        config,
        vision=replace(config.vision, num_dummy_heads={1: 0, 2: 1, 4: 3, 8: 7}[tp_size]),
        decoder=replace(config.decoder, vocab_size=num_rows),
    )


@pytest.mark.parametrize("layers", [[80], [40, 40], [20] * 4, [10, 30, 40]])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_every_published_tensor_is_held_once(tp_size: int, layers: list[int]) -> None:
    tensors = list(megatron_tensors(stored_72b(tp_size), tp_size, layers))
    held = [name for tensor in tensors for name in tensor.holds]
    assert len(held) == 1556
    assert set(held) == {tensor.name for tensor in model_tensors(config_72b())}
    assert len({(tensor.stage, tensor.name) for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vision_model.class_token", (1, 1, 3200)),
        ("vision_model.position_embeddings.weight", (1025, 3200)),
        ("vision_model.decoder.layers.44.self_attention.linear_qkv.weight", (1536, 3200)),
        ("vision_model.decoder.layers.0.self_attention.q_layernorm.weight", (512,)),
        ("vision_model.decoder.layers.0.self_attention.linear_proj.weight", (3200, 512)),
        ("vision_model.decoder.layers.0.mlp.linear_fc1.bias", (1600,)),
        ("vision_model.decoder.layers.0.mlp.linear_fc2.weight", (3200, 1600)),
        ("vision_projection.encoder.linear_fc1.layer_norm_bias", (12800,)),
        ("vision_projection.encoder.linear_fc1.weight", (3696, 12800)),
        ("vision_projection.encoder.linear_fc2.weight", (8192, 3696)),
        ("language_model.embedding.word_embeddings.weight", (19072, 8192)),
        ("language_model.decoder.layers.79.self_attention.linear_qkv.weight", (1280, 8192)),
        ("language_model.decoder.layers.0.self_attention.linear_qkv.bias", (1280,)),
        ("language_model.decoder.layers.0.self_attention.linear_proj.weight", (8192, 1024)),
        ("language_model.decoder.layers.0.mlp.linear_fc1.weight", (7392, 8192)),
        ("language_model.decoder.layers.0.mlp.linear_fc2.weight", (8192, 3696)),
    ],
)
def test_shapes_on_one_of_eight_ranks_are_megatrons(name: str, shape: tuple[int, ...]) -> None:
    tensors = {t.name: t.shape for t in megatron_tensors(stored_72b(8), 8, [80])}
    assert tensors[name] == shape


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_the_72b_config_follows_from_args_and_shapes(tp_size: int) -> None:
    """Also where args hold the vocabulary, context, RoPE base and epsilon of some other run."""
    stored = stored_72b(tp_size)
    args = vars(megatron_writer.arguments(config_json(PRESETS["72b"]), Layout(tp_size)))
    args |= {"rotary_base": 10000, "norm_epsilon": 1e-5, "img_h": 224, "patch_dim": 16}
    tensors = {
        tensor.name: torch.empty(tensor.shape, device="meta")
        for tensor in megatron_tensors(stored, tp_size, [80])
    }
    stages = [[RankFile(Path("model_optim_rng.pt"), args, 1, tensors)] * tp_size]
    config = model_config(stages, num_tokens=151665)
    assert config.published == config_72b().with_projector_norm_eps(1e-6)
    assert config.stored == stored.with_projector_norm_eps(1e-6)
    assert config.layers_per_stage == [80]


# Round trip: Hugging Face -> Megatron -> converted equals Hugging Face -> converted.


@pytest.fixture(scope="module")
def hf_dir(workshop: Workshop) -> Path:
    return workshop.model("megatron_shaped", SHAPE)


@pytest.fixture(scope="module")
def plain_checkpoint(workshop: Workshop, hf_dir: Path) -> dict[str, str]:
    return converted(hf_dir, hf_dir, workshop.root / "megatron_plain", *PLAIN)


def converted(model_dir: Path, tokenizer_dir: Path, output: Path, *flags: object) -> dict[str, str]:
    """Digests of what convert_checkpoint.py made, but of the manifest (which names the source)."""
    where = ("--model_dir", model_dir, "--tokenizer_dir", tokenizer_dir, "--output_dir", output)
    result = run_command(CONVERT, *where, *flags)
    assert result.exit_code == 0, result.stderr
    return {name: digest for name, digest in tree(output).items() if name != "manifest.json"}


@pytest.mark.parametrize(("tp_size", "pp_size"), RANKS)
def test_bfloat16_conversion_from_megatron_equals_that_from_hugging_face(
    tmp_path: Path,
    hf_dir: Path,
    plain_checkpoint: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    tp_size: int,
    pp_size: int,
) -> None:
    write_megatron(hf_dir, tmp_path / "megatron", Layout(tp_size, pp_size))
    found = converted(tmp_path / "megatron", hf_dir, tmp_path / "new", *PLAIN)
    vision = json.loads((tmp_path / "new" / "vision" / "config.json").read_text())["vision"]
    assert vision["projector_norm_eps"] == 1e-6, "as Megatron runs it"
    assert vision["num_dummy_heads"] == 0
    different = {name for name in found | plain_checkpoint if found[name] != plain_checkpoint[name]}
    assert different == {"vision/config.json"}
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == []


@pytest.mark.parametrize(("tp_size", "pp_size"), [(8, 1), (2, 4)])
def test_fp8_conversion_with_the_same_epsilon_equals_that_from_hugging_face(
    tmp_path: Path, workshop: Workshop, hf_dir: Path, tp_size: int, pp_size: int
) -> None:
    flags = ("--device", "cpu", "--calib_size", "2", "--projector_norm_eps")
    megatron_dir = tmp_path / hf_dir.name  # the report names it
    write_megatron(hf_dir, megatron_dir, Layout(tp_size, pp_size))
    from_hf, from_megatron, with_1e5 = (
        converted(model, hf_dir, tmp_path / name, *flags, eps)
        for model, name, eps in (
            (hf_dir, "a", "1e-6"),
            (megatron_dir, "b", "1e-6"),
            (megatron_dir, "c", "1e-5"),
        )
    )
    assert from_hf == from_megatron
    assert from_hf["rank0.safetensors"] != with_1e5["rank0.safetensors"], "epsilon has no effect"


def test_dummy_heads_that_are_not_zero_are_kept_as_from_hugging_face(tmp_path: Path) -> None:
    """8 stored heads on 8 ranks: 2 real ones, 6 dummies, and a 7th that Megatron has not."""
    fresh = Workshop(tmp_path)
    model_dir = fresh.model("hf", SHAPE)

    def edit(tp: int, _: int, content: dict[str, Any]) -> None:
        if tp == 5:
            content["model"][f"{MEGATRON_VISION}self_attention.q_layernorm.weight"] += 1

    write_megatron(model_dir, tmp_path / "megatron", Layout(8), edit)
    source = MegatronSource(tmp_path / "megatron", tokenizer_dir=model_dir)
    norm = source.read(f"{VISION}attn.q_norm.weight").view(9, 128)
    assert torch.equal(norm.any(1), torch.tensor([1, 1, 0, 0, 0, 1, 0, 0, 0]).bool())
    converted(tmp_path / "megatron", model_dir, tmp_path / "new", *PLAIN)
    vision = json.loads((tmp_path / "new" / "vision" / "config.json").read_text())["vision"]
    assert vision["num_dummy_heads"] == 7


@pytest.mark.parametrize(
    ("layout", "folder"),
    [
        (Layout(2, iteration=1), "iter_0000001"),
        (Layout(2, iteration=12345678), "iter_12345678"),
        (Layout(2, iteration="release"), "release"),
        (Layout(1, 2, layers_per_stage=(1, 3)), "iter_0000001"),
        (Layout(2, 3, layers_per_stage=(0, 3, 1), embedding_stage=1), "iter_0000001"),
        # As pp_checkpoint_converter.py leaves them.
        (Layout(1, 2, extra_args={"pipeline_model_parallel_size": 1}), "iter_0000001"),
        # As converters leave them that save every rank from one process.
        (Layout(2, 2, extra_args={"rank": 0}), "iter_0000001"),
        # As another language model's conversion leaves them.
        (Layout(extra_args={"vision_model_type": ..., "kv_channels": None}), "iter_0000001"),
    ],
)
def test_any_iteration_and_stages_are_found_from_the_tracker_or_without_it(
    tmp_path: Path, hf_dir: Path, layout: Layout, folder: str
) -> None:
    top = tmp_path / "megatron"
    assert write_megatron(hf_dir, top, layout).name == folder
    whole = HuggingFaceSource(hf_dir)

    def check(model_dir: Path) -> None:
        source = open_source(model_dir, tokenizer_dir=hf_dir)
        assert isinstance(source, MegatronSource)
        for tensor in model_tensors(whole.config):
            found, expected = source.read(tensor.name), whole.read(tensor.name)
            assert torch.equal(found, expected.bfloat16()), tensor.name

    check(top)
    check(top / folder)
    (top / "iter_0000007").mkdir()
    check(top)
    (top / "iter_0000007").rmdir()
    (top / "latest_checkpointed_iteration.txt").unlink()
    check(top)


def test_hugging_faces_layout_is_recognised_though_its_small_files_lie_beside_megatrons(
    tmp_path: Path, hf_dir: Path
) -> None:
    assert isinstance(open_source(hf_dir), HuggingFaceSource)
    write_megatron(hf_dir, tmp_path, Layout())
    for path in hf_dir.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = open_source(tmp_path)
    assert isinstance(source, MegatronSource)
    assert source.tokenizer_dir == tmp_path


def test_a_replicated_tensor_that_differs_between_ranks_is_reported(
    tmp_path: Path, hf_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(tp: int, _: int, content: dict[str, Any]) -> None:
        content["model"]["language_model.decoder.final_layernorm.weight"] += tp

    write_megatron(hf_dir, tmp_path, Layout(2), edit)
    source = MegatronSource(tmp_path, tokenizer_dir=hf_dir)
    found = source.read("language_model.model.norm.weight")
    assert torch.equal(found, HuggingFaceSource(hf_dir).read("language_model.model.norm.weight"))
    assert "norm.weight differs between tensor-parallel ranks" in caplog.text


def test_what_is_not_used_is_reported(
    tmp_path: Path, hf_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(_tp: int, _pp: int, content: dict[str, Any]) -> None:
        content["model"]["language_model.decoder.layers.0.mlp.router.weight"] = torch.ones(2)
        content["args"].rotary_base = 10000
        content["args"].norm_epsilon = 1e-5

    write_megatron(hf_dir, tmp_path, Layout(2), edit)
    MegatronSource(tmp_path, tokenizer_dir=hf_dir)
    assert "1 tensors are not NVLM-D's and are ignored: ['language_model.deco" in caplog.text
    assert "args.rotary_base is 10000; NVLM-D's 1000000.0 is used" in caplog.text
    assert "args.norm_epsilon is 1e-05; NVLM-D's 1e-06 is used" in caplog.text


def test_the_manifest_names_the_source_and_if_stale_sees_its_changes(
    tmp_path: Path, hf_dir: Path
) -> None:
    megatron, output = tmp_path / "megatron", tmp_path / "new"
    iteration = write_megatron(hf_dir, megatron, Layout(2, 2, iteration=30))

    where = ("--model_dir", megatron, "--tokenizer_dir", hf_dir, "--output_dir", output)

    def is_made_again(*flags: object) -> bool:
        return made_again(output, *where, *flags)

    assert is_made_again()
    assert not is_made_again()
    assert is_made_again("--projector_norm_eps", "1e-5")
    source = json.loads((output / "manifest.json").read_text())["source"]
    assert (source["layout"], source["iteration"]) == ("megatron", 30)
    assert (source["tp_size"], source["pp_size"]) == (2, 2)
    assert source["projector_norm_eps"] == 1e-5
    assert sorted(source["files"]) == [
        f"iter_0000030/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt"
        for tp in range(2)
        for pp in range(2)
    ]
    rank = iteration / "mp_rank_01_001" / "model_optim_rng.pt"
    rank.write_bytes(rank.read_bytes())
    assert is_made_again("--projector_norm_eps", "1e-5")


def test_if_stale_sees_another_epsilon_of_a_hugging_face_checkpoint(
    tmp_path: Path, hf_dir: Path
) -> None:
    where = ("--model_dir", hf_dir, "--output_dir", tmp_path / "new")
    runs = [(), (), ("--projector_norm_eps", "1e-6"), ("--projector_norm_eps", "1e-6")]
    made = [made_again(tmp_path / "new", *where, *flags) for flags in runs]
    assert made == [True, False, True, False]


def made_again(output: Path, *flags: object) -> bool:
    """Whether `--if_stale` wrote another directory."""
    before = output.stat().st_ino if output.exists() else None
    result = run_command(CONVERT, *flags, *PLAIN, "--if_stale")
    assert result.exit_code == 0, result.stderr
    return output.stat().st_ino != before


# Memory, and what is never imported.


_MEASURE = """
import json, re, sys, threading
from pathlib import Path
from build.sources.megatron.source import MegatronSource
from nvlm.formats.tensor_names import model_tensors

def anonymous_bytes():  # RssAnon: memory of our own, not pages of mapped files
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous_bytes())

threading.Thread(target=watch).start()
before = anonymous_bytes()
source = MegatronSource(Path(sys.argv[1]), tokenizer_dir=Path(sys.argv[2]))
opened, most = peak - before, {}
for stored in model_tensors(source.config):
    peak = 0
    tensor = source.read(stored.name)
    most[stored.name] = (tensor.nbytes, max(peak, anonymous_bytes()) - before)
    del tensor
done.set()
print(json.dumps([opened, most]))
"""


@pytest.mark.process
def test_files_are_mapped_and_one_tensor_is_resident(tmp_path: Path) -> None:
    """Opening 80 MB of optimizer state costs nothing; reading costs the tensor that is read."""
    shape = replace(SHAPE, hidden_size=512, intermediate_size=12288, num_hidden_layers=2)
    model_dir = Workshop(tmp_path).model("hf", shape)

    def edit(_tp: int, _pp: int, content: dict[str, Any]) -> None:
        content["optimizer"]["state"][0]["exp_avg"] = torch.ones(10_000_000)

    write_megatron(model_dir, tmp_path / "megatron", Layout(2), edit)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "megatron"), str(model_dir)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "1000000",  # what is freed goes back to the system
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    opened, most = json.loads(done.stdout)
    slack = 16 << 20  # of an interpreter at work: parsing the tokenizer and 2 pickles
    assert opened < slack, f"opening took {opened:,} bytes"
    assert max(size for size, _ in most.values()) > 20_000_000
    for name, (size, taken) in most.items():
        assert taken < size + slack, f"{name} of {size:,} bytes took {taken:,}"


def test_nothing_of_megatron_is_imported(
    tmp_path: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it is installed: here, packages that end the test when they are imported."""
    for package in ("megatron", "transformer_engine"):
        (tmp_path / "installed" / package).mkdir(parents=True)
        code = "raise AssertionError('imported')"
        (tmp_path / "installed" / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    write_megatron(hf_dir, tmp_path / "checkpoint", Layout())
    MegatronSource(tmp_path / "checkpoint", tokenizer_dir=hf_dir)
    assert not [name for name in sys.modules if name.startswith(("megatron", "transformer_e"))]


def test_conversion_from_megatron_is_planned_from_headers(tmp_path: Path, hf_dir: Path) -> None:
    write_megatron(hf_dir, tmp_path / "megatron", Layout(4, 2))
    plans = []
    for model_dir in (hf_dir, tmp_path / "megatron"):
        where = ("--model_dir", model_dir, "--tokenizer_dir", hf_dir)
        result = run_command(CONVERT, *where, "--output_dir", tmp_path / "new", "--dry_run")
        plan = json.loads(result.stdout)
        plans.append({name: value for name, value in plan.items() if "seconds" not in name})
    assert plans[0] == plans[1]
