"""Tensor and pipeline parallel ranks: what each holds, and that together they are the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from build.conversion.convert import ConvertOptions
from build.sources.hugging_face import model_config
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors
from nvlm.formats.mapping import Mapping
from nvlm.model.config import NVLMConfig
from nvlm.model.dtypes import SAFETENSORS_NAMES
from nvlm.planning import memory_plan
from tests.conftest import FP8, TINY, Workshop
from tests.reference.tensorrt_llm_tensors import expected_tensors, stored_tensors
from tests.support.asking import ask
from tests.support.command import BUILD, CONVERT, RUN, one_line_error, refused, run_command
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import Shape, config_json

# 8 query and 2 key and value heads: shared by 2 ranks at tp 4 and by 4 at tp 8. The vocabulary
# does not divide by any of them.
SHAPE = replace(TINY, num_attention_heads=8, num_key_value_heads=2, vocab_size=513)
HEAD_DIM = 16
GRIDS = [(tp, pp) for pp in (1, 2) for tp in (1, 2, 4, 8)]
PLAIN = ConvertOptions(quant_algo=None, kv_cache_quant_algo=None)


@pytest.fixture(scope="module")
def wide_model(workshop: Workshop) -> Path:
    return workshop.model("eight_heads", SHAPE, seed=3)


def ranks_of(workshop: Workshop, model_dir: Path, options: ConvertOptions) -> list[Path]:
    kind = "fp8" if options.quant_algo else "bf16"
    name = f"eight_heads_{kind}_tp{options.tp_size}_pp{options.pp_size}"
    checkpoint = workshop.checkpoint(name, model_dir, options)
    return [checkpoint / f"rank{r}.safetensors" for r in range(options.tp_size * options.pp_size)]


def llm_config(shape: Shape) -> dict[str, object]:
    section: dict[str, object] = config_json(shape)["llm_config"]
    return section


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
@pytest.mark.parametrize(("is_fp8", "has_fp8_head"), [(True, False), (False, False), (True, True)])
def test_every_ranks_tensors_of_the_72b_model_are_those_tensorrt_llm_expects(
    tp: int, pp: int, is_fp8: bool, has_fp8_head: bool
) -> None:
    config = NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))
    algo = "FP8" if is_fp8 else None
    checkpoint = CheckpointConfig(
        config.decoder, "bfloat16", algo, algo, tp, pp, quantize_lm_head=has_fp8_head
    )
    for rank in range(tp * pp):
        found = {
            name: (SAFETENSORS_NAMES[info.dtype], list(info.shape))
            for name, info in decoder_tensors(checkpoint, rank).items()
        }
        section = llm_config(PRESETS["72b"])
        expected = expected_tensors(
            section, tp, pp, rank, fp8=is_fp8, kv_fp8=is_fp8, fp8_head=has_fp8_head
        )
        assert found == expected, rank


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_written_ranks_have_exactly_those_tensors_and_join_to_the_single_rank(
    workshop: Workshop, wide_model: Path, tp: int, pp: int
) -> None:
    """FP8 codes and scales bit by bit; each rank is cut by hand from the rank of TP 1, PP 1."""
    options = replace(FP8, calib_size=1)
    (single,) = ranks_of(workshop, wide_model, options)
    whole = load_file(single)
    paths = ranks_of(workshop, wide_model, replace(options, tp_size=tp, pp_size=pp))
    config = json.loads((paths[0].parent / "config.json").read_text())
    assert config["mapping"] == {
        "world_size": tp * pp,
        "tp_size": tp,
        "pp_size": pp,
        "cp_size": 1,
    }
    assert len(list(paths[0].parent.glob("rank*.safetensors"))) == tp * pp
    for rank, path in enumerate(paths):
        expected = expected_tensors(llm_config(SHAPE), tp, pp, rank, fp8=True, kv_fp8=True)
        assert stored_tensors(path) == expected, rank
        for name, tensor in load_file(path).items():
            assert_bits_equal(tensor, cut(whole, name, tp, pp, rank), f"rank {rank} {name}")


def test_bf16_ranks_join_to_the_single_rank(workshop: Workshop, wide_model: Path) -> None:
    (single,) = ranks_of(workshop, wide_model, PLAIN)
    whole = load_file(single)
    for rank, path in enumerate(
        ranks_of(workshop, wide_model, replace(PLAIN, tp_size=4, pp_size=2))
    ):
        expected = expected_tensors(llm_config(SHAPE), 4, 2, rank, fp8=False, kv_fp8=False)
        assert stored_tensors(path) == expected, rank
        for name, tensor in load_file(path).items():
            assert_bits_equal(tensor, cut(whole, name, 4, 2, rank), f"rank {rank} {name}")


def cut(whole: dict[str, torch.Tensor], name: str, tp: int, pp: int, rank: int) -> torch.Tensor:
    """A rank's tensor from those of one rank, by TensorRT-LLM's rules and without our tables."""
    stage, place = divmod(rank, tp)
    if name.startswith("transformer.layers."):
        local, _, kind = name.removeprefix("transformer.layers.").partition(".")
        layer = int(local) + stage * (SHAPE.num_hidden_layers // pp)
        tensor = whole[f"transformer.layers.{layer}.{kind}"]
    else:
        kind, tensor = name, whole[name]
    if kind.startswith("attention.qkv.") and "scaling" not in kind:
        query, key_value = 8 * HEAD_DIM, 2 * HEAD_DIM
        q, k, v = tensor[:query], tensor[query : query + key_value], tensor[query + key_value :]
        first_query_head = place * 8 // tp
        first_head = first_query_head // 4  # each key head serves four query heads
        num_heads = max(1, 2 // tp)
        heads = slice(first_head * HEAD_DIM, (first_head + num_heads) * HEAD_DIM)
        queries = slice(first_query_head * HEAD_DIM, (first_query_head + 8 // tp) * HEAD_DIM)
        return torch.cat(
            [q[queries].view(torch.uint8), k[heads].view(torch.uint8), v[heads].view(torch.uint8)]
        ).view(tensor.dtype)
    if kind in ("mlp.fc.weight", "mlp.gate.weight"):
        return tensor.chunk(tp, dim=0)[place]
    if kind in ("mlp.proj.weight", "attention.dense.weight"):
        return tensor.chunk(tp, dim=1)[place]
    if kind == "lm_head.weight":
        rows = -(-SHAPE.vocab_size // tp)
        padded = torch.zeros(rows * tp, tensor.shape[1], dtype=tensor.dtype)
        padded[: len(tensor)] = tensor if tp > 1 else whole[name]
        return padded[place * rows : (place + 1) * rows]
    return tensor


def assert_bits_equal(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    bits = (tensor.contiguous().view(torch.uint8) for tensor in (found, expected))
    assert torch.equal(*bits), name


def test_ranks_count_tensor_parallel_first_and_layers_by_stage() -> None:
    places = [(m.pp_rank, m.tp_rank) for m in Mapping(2, 3).all_ranks()]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert Mapping(2, 4, rank=5).layers(80) == range(40, 60)
    assert [Mapping(8, rank=rank).shard(256, num_heads=4) for rank in range(8)] == [
        range(64 * head, 64 * head + 64) for head in (0, 0, 1, 1, 2, 2, 3, 3)
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tp_size", "3"), ("--tp_size 3 does not divide 4 attention heads", "use 1, 2 or 4")),
        (("--pp_size", "4"), ("--pp_size 4 does not divide 2 decoder layers", "use 1 or 2")),
        (("--tp_size", "0"), ("--tp_size", "is '0', expected a positive integer")),
    ],
)
def test_ranks_that_the_model_does_not_divide_into_are_refused(
    tmp_path: Path, model_dir: Path, flags: tuple[str, ...], message: tuple[str, ...]
) -> None:
    start = ("--model_dir", model_dir, "--output_dir", tmp_path / "out")
    refused(tmp_path, CONVERT, *start, *flags, fragments=message)


def test_an_engine_carries_every_rank_and_decoder_torch_refuses_stages(
    workshop: Workshop, wide_model: Path, tmp_path: Path
) -> None:
    paths = ranks_of(workshop, wide_model, replace(PLAIN, tp_size=4, pp_size=2))
    checkpoint, engine = paths[0].parent, tmp_path / "engine"
    flags = ("--checkpoint_dir", checkpoint, "--engine_dir", engine, "--vision", "torch")
    assert run_command(BUILD, *flags).exit_code == 0
    for path in paths:
        assert (engine / "llm" / path.name).samefile(path), "linked, not copied"
    config = json.loads((engine / "llm" / "config.json").read_text())
    assert config["pretrained_config"]["mapping"]["world_size"] == 8
    result = run_command(RUN, *ask(engine, "--prompt", "hi"))
    one_line_error(result, "tp_size=4, pp_size=2", "one stage only", "--tp_size 8 --pp_size 1")


def test_the_plan_is_a_ranks(workshop: Workshop, wide_model: Path) -> None:
    config = NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))
    one, eight, stages = (
        CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8", tp, pp)
        for tp, pp in ((1, 1), (8, 1), (16, 2))
    )
    assert (
        memory_plan.kv_bytes_per_token(eight)
        == memory_plan.kv_bytes_per_token(one) // 8
        == 20 * 1024
    )
    assert memory_plan.kv_bytes_per_token(stages) == 10 * 1024, (
        "one of 8 heads on two ranks, 40 layers"
    )
    # 1/8 of the linears and of the head, and the whole embedding.
    assert memory_plan.decoder_weight_bytes(eight) == pytest.approx(
        (memory_plan.decoder_weight_bytes(one) - 2.4914e9) / 8 + 2.4914e9, rel=1e-3
    )
    stored = sum(
        path.stat().st_size
        for path in ranks_of(workshop, wide_model, replace(PLAIN, tp_size=4, pp_size=2))
    )
    small = model_config(wide_model)
    planned = CheckpointConfig(small.decoder, "bfloat16", None, None, 4, 2)
    ranks = sum(memory_plan.decoder_weight_bytes(planned, rank) for rank in range(8))
    assert ranks == pytest.approx(stored, rel=0.03)
