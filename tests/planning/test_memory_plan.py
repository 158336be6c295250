"""The memory plan against the published sizes of the 72B model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.config import NVLMConfig
from nvlm.planning import hopper, memory_plan
from nvlm.planning.limits import EngineLimits, derive_limits
from nvlm.planning.peer_memory import peer_memory_bytes
from nvlm.program.errors import UserError
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import config_json

GIB = 1 << 30


@pytest.fixture(autouse=True)
def a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "has_kernels", lambda device: device.type == "cuda")


@pytest.fixture(scope="module")
def config() -> NVLMConfig:
    return NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))


def test_the_decoder_has_its_published_parameter_count_and_bytes(config: NVLMConfig) -> None:
    fp8 = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8")
    bf16 = CheckpointConfig(config.decoder, "bfloat16", None, None)
    assert memory_plan.decoder_parameter_count(fp8) == 72_706_203_648
    assert memory_plan.decoder_weight_bytes(bf16) == 2 * 72_706_203_648
    # 70.2 GB of FP8 linears, 4.98 GB of embedding and head: 75.2 GB resident.
    assert memory_plan.decoder_weight_bytes(fp8) == pytest.approx(75.2e9, rel=1e-3)


def test_a_head_in_fp8_takes_half_its_bytes_on_every_rank(config: NVLMConfig) -> None:
    for tp_size in (1, 2, 8):
        wide = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8", tp_size)
        narrow = replace(wide, quantize_lm_head=True)
        saved, scales = 152064 * 8192 // tp_size, 8  # 1.25 GB in all
        found = memory_plan.decoder_weight_bytes(wide) - memory_plan.decoder_weight_bytes(narrow)
        assert found == saved - scales
        counts = {memory_plan.decoder_parameter_count(each) for each in (wide, narrow)}
        assert len(counts) == 1


def test_kv_cache_takes_160_kib_a_token_in_fp8_and_320_in_bf16(config: NVLMConfig) -> None:
    fp8 = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8")
    bf16 = CheckpointConfig(config.decoder, "bfloat16", None, None)
    assert memory_plan.kv_bytes_per_token(fp8) == 160 * 1024
    assert memory_plan.kv_bytes_per_token(bf16) == 320 * 1024


def test_the_vision_model_has_its_published_parameter_count(config: NVLMConfig) -> None:
    parameters = 6_052_672_640 + 620_717_056  # ViT with its dummy heads, projector
    assert memory_plan.vision_weight_bytes(config.vision, "bfloat16") == 2 * parameters
    assert memory_plan.vision_weight_bytes(config.vision, "float32") == 4 * parameters
    assert memory_plan.vision_weight_bytes(config.vision, "FP8") < 1.15 * parameters + 620_717_056


def limits_for(config: NVLMConfig, **given: int) -> EngineLimits:
    return derive_limits(
        config.decoder,
        config.tiling,
        config.vision.tokens_per_tile,
        **given,  # type: ignore[arg-type]
    )


def test_default_limits_hold_the_largest_image_and_leave_room_for_the_answer(
    config: NVLMConfig,
) -> None:
    limits = limits_for(config, max_batch_size=16, max_num_images=1)
    assert limits.max_multimodal_len == 16 * 7 * 256
    assert limits.max_input_len >= 7 * 261 + 1024
    assert limits.max_seq_len == limits.max_input_len + 1024
    assert limits.max_num_tokens == 8192


@pytest.mark.parametrize("asked", [None, 1 << 20])
def test_a_step_is_planned_for_no_more_tokens_than_a_batch_holds(
    config: NVLMConfig, asked: int | None
) -> None:
    limits = limits_for(config, max_batch_size=1, max_num_tokens=asked)
    assert limits.max_num_tokens == limits.max_seq_len < 8192
    limits = limits_for(config, max_batch_size=3, max_num_tokens=asked)
    assert limits.max_num_tokens == (3 * limits.max_seq_len if asked else 8192)


def test_the_prompt_table_of_a_batch_of_16_takes_half_a_gigabyte(config: NVLMConfig) -> None:
    fp8 = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8")
    limits = limits_for(config, max_batch_size=16, max_num_images=1)
    h200 = torch.device("cuda"), int(141e9)
    engine = memory_plan.plan_engine(fp8, config.vision, "bfloat16", limits, *h200)
    assert engine.prompt_table_bytes == pytest.approx(0.47e9, rel=0.01)
    assert engine.total_bytes == sum(
        getattr(engine, f"{part}_bytes")
        for part in ("decoder_weight", "vision_weight", "kv_cache", "prompt_table", "workspace")
    )
    assert engine.total_bytes < 141e9, "the FP8 model fits one H200"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_seq_len": 40000}, "max_seq_len 40000 exceeds the model's 32768 positions"),
        ({"max_input_len": 5000, "max_seq_len": 5000}, "leaves no room for an answer"),
        ({"max_input_len": 1000}, "does not hold --max_num_images 1"),
        ({"max_input_len": 4000, "max_num_tokens": 3000}, "a prompt must fit one step"),
        (
            {"max_num_images": 20},
            "--max_num_images 20 takes .* has 32768 positions",
        ),
    ],
)
def test_limits_that_contradict_themselves_are_refused(
    config: NVLMConfig, given: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        limits_for(config, **given)


class TestTensorrtLlm:
    def plan(self, config: NVLMConfig, tp_size: int, memory_bytes: int) -> memory_plan.EnginePlan:
        fp8 = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8", tp_size)
        limits = limits_for(config, max_batch_size=16)
        return memory_plan.plan_tensorrt_llm(
            fp8, config.vision, "bfloat16", limits, 56, memory_bytes
        )

    def test_the_kv_cache_takes_its_fraction_of_what_is_left(self, config: NVLMConfig) -> None:
        found = self.plan(config, 4, 80 * 10**9)
        left = 80e9 - (found.total_bytes - found.kv_cache_bytes)
        assert found.kv_cache_bytes == pytest.approx(0.9 * left)
        assert found.kv_cache_tokens == found.kv_cache_bytes // (40 * 1024)
        assert found.total_bytes < 80e9

    def test_every_rank_holds_the_whole_prompt_table(self, config: NVLMConfig) -> None:
        tables = {self.plan(config, tp, 80 * 10**9).prompt_table_bytes for tp in (1, 2, 4, 8)}
        assert tables == {16 * 7 * 256 * 8192 * 2}

    def test_it_fits_only_with_a_cache_for_the_longest_request(self, config: NVLMConfig) -> None:
        fixed = self.plan(config, 1, 0).total_bytes
        longest = limits_for(config).max_seq_len * 160 * 1024
        assert not self.plan(config, 1, fixed).fits(fixed)
        memory = int(fixed + longest / 0.9) + 10**6
        assert self.plan(config, 1, memory).fits(memory)
        assert not self.plan(config, 1, memory - 2 * 10**6).fits(memory - 2 * 10**6)


def test_ranks_of_one_cpu_widen_where_all_of_them_fit(config: NVLMConfig) -> None:
    """4 bytes a parameter, within a quarter of the memory; heads and norms that are not split
    make ranks a little more than one."""
    memory_bytes = int(4 * 4 * 72.71e9)
    for tp_size, expected in ((1, True), (2, False)):
        rank = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8", tp_size)
        assert memory_plan.decoder_may_widen(rank, torch.device("cpu"), memory_bytes) is expected
        assert not memory_plan.decoder_may_widen(rank, torch.device("cuda"), memory_bytes)
        assert memory_plan.decoder_may_widen(rank, torch.device("cpu"), 2 * memory_bytes)


def test_kernels_take_less_than_plain_torch_and_a_rank_less_than_the_whole(
    config: NVLMConfig,
) -> None:
    limits = limits_for(config)
    sizes = {
        (quant_algo, tp_size): memory_plan.decoder_workspace_bytes(
            CheckpointConfig(config.decoder, "bfloat16", quant_algo, quant_algo, tp_size),
            limits,
            torch.device("cuda"),
            10**11,
        )
        for quant_algo in ("FP8", None)
        for tp_size in (1, 4)
    }
    four = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8", 4)
    shared = peer_memory_bytes(four, limits)
    assert sizes["FP8", 4] - shared < sizes["FP8", 1] < sizes[None, 1] / 2
    parts_and_norms = (2 * 4 + 2) * limits.max_num_tokens * config.decoder.hidden_size
    assert shared >= parts_and_norms + 4 * limits.max_batch_size * config.decoder.vocab_size
    hidden = 2 * limits.max_num_tokens * config.decoder.hidden_size
    assert sizes["FP8", 4] > 4 * hidden, "what is not split"


def test_on_a_cpu_the_plan_counts_what_is_widened(config: NVLMConfig) -> None:
    fp8 = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8")
    limits = limits_for(config)
    gpu, laptop, server = (
        memory_plan.plan_engine(fp8, config.vision, "bfloat16", limits, torch.device(name), size)
        for name, size in (("cuda", 10**11), ("cpu", 10**11), ("cpu", 2 * 10**12))
    )
    assert laptop.kv_cache_bytes == 2 * gpu.kv_cache_bytes, "e4m3 values held as bfloat16"
    assert laptop.decoder_weight_bytes == gpu.decoder_weight_bytes
    assert laptop.workspace_bytes > 5e9, "the largest linear is widened at each use"
    assert server.decoder_weight_bytes > gpu.decoder_weight_bytes + 4 * 72e9
