"""The programs that measure on a GPU run on a CPU too, at a tiny size and without meaning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.hopper import beside, kernels, kv_cache, load, measure, memory
from bench.hopper.decoder import random_prompt
from bench.peers import hugging_face
from bench.synthetic_engine import decoder_source, synthetic_engine
from bench.synthetic_runner import draw_pictures, write_tokenizer
from nvlm.inputs.images import load_image
from nvlm.inputs.tiling import tile_image
from nvlm.inputs.tokenizer import IM_END, IM_START, Detokenizer, Tokenizer
from runtime.decoder.models.hopper_weights import load_hopper_weights
from tests.conftest import CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_every_kernel_is_measured_for_every_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--shape", "tiny", "--batch_sizes", "1,3", "--context", "130"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["copy_bytes_per_s"] > 0
    names = {(row["batch_size"], row["kernel"]) for row in found["kernels"]}
    heads = ("head, FP8", "head, bfloat16")
    for kernel in ("add_rms_norm", "decode_attention", "gate_up_swiglu", "down linear", *heads):
        assert {(1, kernel), (3, kernel)} <= names
    assert {(64, "chunk_attention"), (128, "chunk_attention")} <= names
    assert all(row["ms"] > 0 and row["bytes"] > 0 for row in found["kernels"])


def test_kernels_without_a_context_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kernels.main(["--shape", "tiny", "--context", "0"])
    assert ended.value.code == 2
    assert "--context is 0, expected positions from 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is what is tested")
@pytest.mark.process
def test_decode_attention_is_measured_as_chosen() -> None:
    """Triton's interpreter has to be chosen before Triton is imported."""
    options = ["--kv_heads", "1", "--batch_sizes", "1", "--context", "70"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.hopper.attention", *options],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(done.stdout.splitlines()[-1])["attention"]
    assert (row["kv_heads"], row["batch_size"], row["is_chosen"]) == (1, 1, True)
    assert row["ms"] > 0
    assert row["bytes"] == 2 * 70 * 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_decode_steps_are_measured_beside_pictures(
    capsys: pytest.CaptureFixture[str], way: str
) -> None:
    options = "--shape tiny --layers 1 --batch_size 2 --context 200 --tiles 2"
    beside.main([way, *options.split(), "--precision", "float32", "--rate", "20", "--seconds", "1"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["beside"]
    assert row["num_pictures"] > 0
    assert row["num_steps_beside"] > 0
    assert 0 < row["beside_step_ms"]["p50"] <= row["beside_step_ms"]["max"]


@pytest.mark.parametrize("way", ["green", "slices"])
def test_a_way_that_needs_a_gpu_is_refused(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        beside.main([way])
    assert ended.value.code == 2
    assert f"{way} needs a GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_no_cpu_is_given_the_72b_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure.main(["decode"])
    assert ended.value.code == 2
    assert (
        "--shape 72b needs a GPU, and torch sees none; give --shape tiny" in capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_every_phase_is_measured_through_the_executors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = ["decode", "prefill", "first_token", "serving", "vision"]
    options = "--shape tiny --layers 1,2 --batch_sizes 1,3 --context 64 --prompts 50"
    options += f" --requests 5 --answer 4 --tiles 1 --profile {tmp_path / 'profile.log'}"
    measure.main([*phases, *options.split()])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["phase"], row["num_layers"], row["batch_size"]) for row in found["rows"]]
    for num_layers in (1, 2):
        assert {("decode", num_layers, 1), ("decode", num_layers, 3)} <= set(rows)
        assert {("prefill", num_layers, 1), ("prefill, new", num_layers, 1)} <= set(rows)
        assert {("prefill, busy", num_layers, 1), ("decode, kernels", num_layers, 3)} <= set(rows)
    assert {("serving", 2, 3), ("first, bfloat16", 2, 1), ("first, FP8", 2, 1)} <= set(rows)
    assert {("vision bfloat16", 2, 1), ("vision FP8, busy", 2, 1)} <= set(rows)
    assert all(row["ms"] > 0 and row["rate"] > 0 for row in found["rows"])
    assert len(found["slopes"]) == 8
    assert "2 layers, prompt of 50 tokens" in (tmp_path / "profile.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_a_step_with_a_head_in_fp8_reads_fewer_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["decode", "--shape", "tiny", "--layers", "1", "--batch_sizes", "1"]
    options += ["--context", "64", "--prompts", "50"]
    rows = []
    for more in ([], ["--fp8_head"]):
        measure.main([*options, *more])
        rows += json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    wide, narrow = (1e-3 * row["ms"] * row["rate"] for row in rows)
    assert wide - narrow == pytest.approx(512 * 256 - 8, rel=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_both_kv_caches_take_turns_over_the_same_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "--shape tiny --layers 1 --batch_sizes 3 --context 64 --prompts 50 --rounds 2"
    kv_cache.main(options.split())
    out = capsys.readouterr().out
    turns = [line.split()[2] for line in out.splitlines() if line.startswith("KV cache ")]
    in_one = len(turns) // 4
    assert turns == (["FP8"] * in_one + ["bfloat16"] * in_one) * 2
    rows = json.loads(out.splitlines()[-1])["kv_cache"]
    measured = {(row["phase"], row["batch_size"], row["num_tokens"]) for row in rows}
    assert {("decode", 3, 64), ("prefill", 1, 50)} <= measured
    for row in rows:
        assert row["ms"].keys() == row["ms_of_rounds"].keys() == {"FP8", "bfloat16"}
        assert all(len(each) == 2 and min(each) > 0 for each in row["ms_of_rounds"].values())
        assert row["bfloat16_over_fp8"] == row["ms"]["bfloat16"] / row["ms"]["FP8"]


def test_a_bfloat16_cache_has_no_scales_and_the_same_weights() -> None:
    engine = synthetic_engine("tiny", 2, max_batch_size=1, max_seq_len=90)
    source = decoder_source(engine, CPU)
    weights = load_hopper_weights(source, engine.checkpoint_config, CPU)
    stored, as_fp8 = kv_cache.with_cache(engine, weights, "FP8")
    assert stored.checkpoint_config == engine.checkpoint_config
    assert as_fp8 is weights
    wide, without = kv_cache.with_cache(engine, weights, "bfloat16")
    assert wide.checkpoint_config.kv_cache.in_dtype
    for layer, published in zip(without.layers, weights.layers, strict=True):
        assert published.kv_scales is not None
        assert layer.kv_scales is None
        assert layer.down is published.down


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_rows_with_settings_and_guides_take_turns_with_plain_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "--shape tiny --layers 1,2 --batch_sizes 1,6 --context 64 --prompts 20"
    measure.main(["settings", *options.split()])
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {(row["phase"], row["num_layers"], row["batch_size"]) for row in rows} == {
        (f"decode, {variant}", num_layers, batch_size)
        for variant in ("plain", "drawn", "settings", "guided")
        for num_layers in (1, 2)
        for batch_size in (1, 6)
    }
    assert "2 layers, batch 6: guided " in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_pictures_arrive_through_the_server_while_texts_decode(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "--shape tiny --layers 1 --batch_sizes 1 --context 80 --prompts 20"
    measure.main(["interactive", *options.split(), "--picture_rate", "0,6", "--seconds", "1"])
    first, quiet, busy = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert first["phase"] == "first pictures"
    assert len(first["first_token_ms"]) == 10
    assert first["num_tokens"] == 7 * 4 + 156
    assert (quiet["picture_rate"], quiet["num_pictures"], quiet["first_token_ms"]) == (0, 0, {})
    assert (busy["picture_rate"], busy["num_pictures"]) == (6, 6)
    for row in (quiet, busy):
        gaps = row["gap_ms"]
        assert 0 < gaps["p50"] <= gaps["p90"] <= gaps["p99"] <= gaps["max"]
        assert row["num_restarts"] > 0, "answers of 40 tokens end within the second"
    assert 0 < busy["first_token_ms"]["median"] <= busy["first_token_ms"]["max"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_pictures_and_loads_are_measured_for_each_bound_of_a_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "--shape tiny --layers 1 --batch_sizes 1 --context 80 --prompts 20"
    options += " --picture_rate 4 --seconds 0.5 --serving 64/4/6/3 --max_step_ms 0,7.5"
    measure.main(["interactive", "serving", *options.split()])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["phase"], row.get("max_step_ms")) for row in rows] == [
        ("first pictures", None),
        ("interactive", 0.0),
        ("interactive", 7.5),
        ("served", None),
        ("served, 7.5 ms a step", None),
    ]


@pytest.mark.process  # the clients'
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_the_same_load_comes_alone_and_over_http(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
    from bench.hopper import http

    options = "--shape tiny --layers 1 --load 60/4/6/3 --rounds 1 --num_first 2 --no_graphs"
    http.main([*options.split(), "--output", str(tmp_path / "http.json")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "http.json").read_text())
    assert found["load"] == "60/4/6/3"
    assert found["ratio"] == found["http_tokens_per_s"][0] / found["tokens_per_s"][0]
    assert len(found["first_token_ms"]) == len(found["http_first_token_ms"]) == 2
    assert all(each > 0 for each in (*found["first_token_ms"], *found["http_first_token_ms"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_loads_of_any_size_are_served(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--shape tiny --layers 1 --batch_sizes 1,3 --context 64 --prompts 20"
    measure.main(["serving", *options.split(), "--serving", "64/4/6/5,64/3/9/0,50/4/2/2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["phase"], row["num_tokens"], row["batch_size"]) for row in rows] == [
        ("served", 64, 5),
        ("served", 64, 5),  # 0: the engine's limit, the largest that a load names
        ("served", 50, 2),
    ]
    assert all(row["tokens_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("text", ["2048/128/256", "a/1/1/1", "1/0/1/1", "1/1/1/-1", ""])
def test_what_is_no_load_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure.main(["serving", "--serving", text])
    assert "argument --serving" in capsys.readouterr().err


def test_every_picture_has_seven_tiles_of_its_own(tmp_path: Path) -> None:
    """Otherwise a request would find another's blocks in the KV cache."""
    pictures = [
        tile_image(load_image(path), 56, 6) for path in draw_pictures(tmp_path / "p", 5, 56)
    ]
    assert {picture.num_tiles for picture in pictures} == {7}
    assert len({picture.cache_key for picture in pictures}) == 5


@pytest.mark.parametrize("vocab_size", [512, 152064])
def test_every_token_is_a_text_at_once(tmp_path: Path, vocab_size: int) -> None:
    """Otherwise a server would report nothing for it, and the gap would span two tokens."""
    write_tokenizer(tmp_path / "tokenizer", vocab_size)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    silent = {i for i in range(vocab_size) if not Detokenizer(tokenizer).push(i)}
    assert silent == {tokenizer.special_id(name) for name in (IM_START, IM_END)}
    assert tokenizer.num_tokens == vocab_size + 128, "bytes beyond ASCII, which no model draws"


def test_memory_is_reported_for_every_stage_of_a_full_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the counters of a GPU that is not there."""
    counts = {"max_memory_allocated": 1, "memory_reserved": 2, "reset_peak_memory_stats": None}
    for name, value in {**counts, "synchronize": None, "mem_get_info": (10**9, 2 * 10**9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    engine = synthetic_engine(
        "tiny", 1, max_batch_size=3, max_seq_len=90, max_num_tokens=200, vision_precision="FP8"
    )
    stages, num_tokens = memory.measure(engine, torch.device("cpu"))
    names = ["CUDA", "vision", "its graphs", "decoder", "tiles", "full steps"]
    assert [stage.name for stage in stages] == names
    assert num_tokens == 3 * 96, "three requests in whole blocks, free again"


def test_prompts_of_other_lengths_and_seeds_share_no_beginning() -> None:
    """Otherwise blocks that the last measurement left would be found, and nothing computed."""
    prompts = [random_prompt(152064, n, seed) for n in (40, 1948, 2048) for seed in (0, 1, 1000)]
    assert len({prompt[0] for prompt in prompts}) == len(prompts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_loading_is_measured_from_a_file_beside_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load.main(["--shape", "tiny", "--layers", "1", "--disk", "--folder", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bytes"] == (tmp_path / "llm" / "rank0.safetensors").stat().st_size
    assert found["share_of_disk"] > 0


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_loading_and_a_start_are_measured_from_the_page_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load.main(["--shape", "tiny", "--layers", "1", "--folder", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(rate > 0 for rate in found["gb_per_s"].values())
    assert {"load", "read, 1 thread", "pinned copy"} <= set(found["gb_per_s"])
    for start in found["starts"].values():
        assert 0 < start["without_load_s"] <= start["ready_s"]
        assert {"python and imports", "decoder weights"} <= set(start["spent_s"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_a_peer_is_measured_by_the_same_phases(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--shape tiny --layers 1,2 --batch_sizes 2 --context 20 --prompts 20"
    hugging_face.main(options.split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["phase"] for row in found["rows"]} == {"decode", "prefill"}
    assert len(found["slopes"]) == 2


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (kernels.main, ["--batch_sizes", "0"]),
        (kernels.main, ["--prompts", "8,"]),
        (kernels.main, ["--batch_sizes", "1,-8"]),
        (measure.main, ["vision", "--tiles", "many"]),
        (measure.main, ["decode", "--layers", "0"]),
        (measure.main, ["interactive", "--picture_rate", "1,-1"]),
        (measure.main, ["interactive", "--max_step_ms", "nan"]),
    ],
)
def test_lists_of_numbers_are_checked_before_anything_runs(
    main: Callable[[list[str]], None], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"argument {words[-2]}: {words[-1]!r}: expected " in capsys.readouterr().err
