"""Engines whose KV cache is not as their checkpoint says: built, planned, reported and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from build.engines.specification import BuildOptions, specify
from evaluation.asking.task_record import task_settings
from nvlm.model.number_formats import FP8 as FP8_FORMAT
from nvlm.planning import hopper
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.models.kv_blocks import count_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.doctor import examine, lines
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from tests.conftest import BF16, CPU, FP8, MEMORY_BYTES, Workshop
from tests.support.command import BUILD, RUN, one_line_error, run_command
from tests.support.damage import edit_json, sealed_again
from tests.support.decoding import generate
from tests.support.kv_caches import KV_CACHES, kv_cache_engine
from tests.support.tolerances import FP8_LOGITS, relative_error

NAMES = {"own scales": "FP8, K and V by own scales", "bfloat16": "bfloat16"}


@pytest.fixture(scope="module")
def engines(workshop: Workshop, checkpoint_dir: Path, engine_dir: Path) -> dict[str, EngineDir]:
    made = {name: kv_cache_engine(workshop, checkpoint_dir, name) for name in KV_CACHES}
    return {name: EngineDir.read(path) for name, path in {"FP8": engine_dir, **made}.items()}


def test_all_run_the_checkpoints_own_file_and_are_close(engines: dict[str, EngineDir]) -> None:
    logits = {}
    for name, engine in engines.items():
        assert engine.directory.joinpath("llm/rank0.safetensors").stat().st_nlink > 1
        executor = TorchDecoderExecutor.load(engine, CPU)
        executor.submit(DecoderRequest(list(range(10, 60)), 1, return_logits=True))
        found = executor.step()[0].logits
        assert found is not None
        logits[name] = found
    for name in KV_CACHES:
        assert 0 < relative_error(logits[name], logits["FP8"]) < FP8_LOGITS


def test_a_bfloat16_cache_is_that_of_a_conversion_without_one(
    engines: dict[str, EngineDir], workshop: Workshop, model_dir: Path
) -> None:
    checkpoint = workshop.checkpoint(
        "fp8_bf16_kv", model_dir, replace(FP8, kv_cache_quant_algo=None)
    )
    converted = EngineDir.read(workshop.engine("engine_fp8_bf16_kv", checkpoint, vision="torch"))
    requests = [DecoderRequest(list(range(first, 60)), 12) for first in (3, 30)]
    found, expected = (
        generate(TorchDecoderExecutor.load(engine, CPU), requests)
        for engine in (engines["bfloat16"], converted)
    )
    assert found == expected


def test_own_scales_are_amax_by_448_of_k_and_of_v(
    engines: dict[str, EngineDir], checkpoint_dir: Path
) -> None:
    report = json.loads((checkpoint_dir / "quantization_report.json").read_text())
    amax = {row["layer"]: (row["k_amax"], row["v_amax"]) for row in report["attention"]}
    found = engines["own scales"].checkpoint_config.kv_cache.scales
    assert len(found) == len(amax)
    for i, scales in enumerate(found):
        wanted = amax[f"transformer.layers.{i}.attention"]
        assert scales == tuple(FP8_FORMAT.scale_from_amax(each) for each in wanted)


def test_the_plan_and_the_blocks_have_the_caches_bytes(
    engines: dict[str, EngineDir], checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "has_kernels", lambda device: True)
    device = torch.device("cuda")

    def cache_bytes(**options: Any) -> int:
        chosen = BuildOptions(decoder="torch", vision="torch", **options)
        return specify(checkpoint_dir, chosen, device, MEMORY_BYTES).plan.kv_cache_bytes

    assert cache_bytes(kv_cache_dtype="bfloat16") == 2 * cache_bytes()
    assert cache_bytes(kv_cache_scales="own") == cache_bytes(kv_cache_dtype="fp8") == cache_bytes()
    for engine in engines.values():
        assert hopper.takes_fast_path(engine.checkpoint_config, device)
    monkeypatch.setattr(
        "runtime.decoder.models.kv_blocks.total_memory_bytes", lambda device: 80 << 30
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000_000_000, 80 << 30))
    roomy = {
        name: replace(engine, limits=replace(engine.limits, max_batch_size=1 << 16))
        for name, engine in engines.items()
    }
    assert count_blocks(roomy["bfloat16"], device) == count_blocks(roomy["FP8"], device) // 2


def test_the_doctor_and_a_benchmarks_record_say_which(engines: dict[str, EngineDir]) -> None:
    directories = [engine.directory for engine in engines.values()]
    *_, fp8, own, bfloat16 = lines(examine(directories))
    assert fp8.endswith("KV cache FP8")
    assert own.endswith(f"KV cache {NAMES['own scales']}")
    assert bfloat16.endswith("KV cache bfloat16")
    request = GenerationRequest("What?")
    recorded = [
        task_settings(engine, request, None)["kv_cache_quant_algo"] for engine in engines.values()
    ]
    assert recorded == ["FP8", NAMES["own scales"], None]


def test_compare_says_which_of_both(engines: dict[str, EngineDir]) -> None:
    flags = ("--prompt", "What?", "--max_new_tokens", 3, "--device", "cpu")
    for name, message in NAMES.items():
        result = run_command(
            RUN,
            *("--engine_dir", engines[name].directory, "--compare", engines["FP8"].directory),
            *flags,
        )
        assert result.exit_code == 0, result.stderr
        assert f"KV cache {message}, reference FP8\n" in result.stdout


def test_an_engine_as_its_checkpoint_says_is_written_as_before(
    engines: dict[str, EngineDir], fresh: Workshop, checkpoint_dir: Path
) -> None:
    """So that engines of older versions, which have no such section, are those of this one."""
    assert "kv_cache" not in json.loads((engines["FP8"].directory / "llm/config.json").read_text())
    asked = fresh.engine("asked", checkpoint_dir, vision="torch", kv_cache_dtype="fp8")
    assert "kv_cache" not in json.loads((asked / "llm/config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BF16, "--kv_cache_dtype fp8 needs KV scales"),
        (replace(FP8, kv_cache_quant_algo=None), "--kv_cache_dtype fp8 needs KV scales"),
    ],
)
def test_fp8_without_scales_is_refused(
    workshop: Workshop, model_dir: Path, tmp_path: Path, options: Any, message: str
) -> None:
    name = f"checkpoint_{options.quant_algo}_{options.kv_cache_quant_algo}"
    checkpoint = workshop.checkpoint(name, model_dir, options)
    result = run_command(
        BUILD,
        *("--checkpoint_dir", checkpoint, "--engine_dir", tmp_path / "engine"),
        *("--device", "cpu", "--kv_cache_dtype", "fp8"),
    )
    one_line_error(result, message, str(checkpoint), "--kv_cache_quant_algo FP8")
    assert list(tmp_path.iterdir()) == []


def refused(checkpoint: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        specify(checkpoint, BuildOptions(vision="torch", **options), CPU, MEMORY_BYTES)
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_or_a_target_cannot_give_is_refused(
    workshop: Workshop, model_dir: Path, checkpoint_dir: Path
) -> None:
    half = workshop.checkpoint("fp8_float16", model_dir, replace(FP8, dtype="float16"))
    refused(half, "needs a checkpoint in bfloat16, and .* is in float16", kv_cache_dtype="bfloat16")
    both: dict[str, Any] = {"kv_cache_dtype": "bfloat16", "kv_cache_scales": "own"}
    refused(checkpoint_dir, "--kv_cache_scales own needs an FP8 KV cache", **both)
    for options, fix in (
        ({"kv_cache_dtype": "bfloat16"}, "convert with --kv_cache_quant_algo none"),
        ({"kv_cache_scales": "own"}, "leave it out"),
    ):
        message = f"found --kv_cache_.*; use --decoder torch, or {fix}"
        refused(checkpoint_dir, message, decoder="tensorrt_llm", **options)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kv_cache.format", "int8", "kv_cache.format is 'int8'"),
        ("kv_cache.scales", [[0.1, 0.2]], "kv_cache.scales is"),
        ("kv_cache.scales", [[0.1, 0.2], [0.1, 0.0]], "a scale of K and one of V for 2 layers"),
        ("kv_cache.scales", "0.1", "kv_cache.scales is '0.1'"),
        ("kv_cache", [], "kv_cache is "),
    ],
)
def test_an_engine_of_damaged_scales_is_refused(
    fresh: Workshop, checkpoint_dir: Path, path: str, value: object, message: str
) -> None:
    engine = fresh.engine("engine", checkpoint_dir, vision="torch", kv_cache_scales="own")
    edit_json(engine / "llm" / "config.json", path, value)
    sealed_again(engine)
    with pytest.raises(UserError, match=message):
        EngineDir.read(engine)


@pytest.mark.parametrize("value", [..., "much", -1.0])
def test_a_report_without_amax_is_refused(fresh: Workshop, model_dir: Path, value: object) -> None:
    checkpoint = fresh.checkpoint("checkpoint", model_dir, FP8)
    path = checkpoint / "quantization_report.json"
    rows = json.loads(path.read_text())["attention"]
    rows[0] = {name: x for name, x in rows[0].items() if name != "k_amax"}
    edit_json(path, "attention", rows if value is ... else [{**rows[0], "k_amax": value}, rows[1]])
    sealed_again(checkpoint)
    refused(checkpoint, "has no amax of K and V of every layer", kv_cache_scales="own")
