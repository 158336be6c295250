"""How long work may take before it hangs: by the plan, and never less than a slow machine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.config import NVLMConfig
from nvlm.planning.step_limit import LEAST_S, StepLimit, decoder_step_limit, vision_limit
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import config_json

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MINUTE, HOUR = 60.0, 3600.0
NVLM_72B = NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))
CONFIG_72B = CheckpointConfig(NVLM_72B.decoder, "bfloat16", "FP8", "FP8")
VISION_72B = NVLM_72B.vision


def test_a_step_of_72b_on_a_cpu_may_take_minutes_and_a_prompt_hours() -> None:
    limit = decoder_step_limit(CONFIG_72B, CPU)
    assert 5 * MINUTE < limit.seconds(1) < HOUR
    assert limit.seconds(2048) > HOUR


def test_a_step_of_72b_on_a_gpu_hangs_after_a_minute_and_its_longest_after_ten() -> None:
    limit = decoder_step_limit(CONFIG_72B, CUDA)
    assert LEAST_S < limit.seconds(1) < LEAST_S + 1
    assert limit.seconds(64 * 1024) < 10 * MINUTE


def test_a_prompt_on_an_h200_is_far_from_its_limit() -> None:
    """8,900 tokens/s of all 80 layers: bench/results/hopper_h200_rooms.json."""
    limit = decoder_step_limit(CONFIG_72B, CUDA)
    assert limit.seconds(1948) - LEAST_S > 50 * 1948 / 8900


def test_tiles_have_a_limit_of_their_own() -> None:
    seven = 7 * VISION_72B.num_positions
    assert vision_limit(VISION_72B, CUDA).seconds(seven) < 2 * MINUTE
    assert vision_limit(VISION_72B, CPU).seconds(seven) > 10 * MINUTE


@pytest.mark.parametrize("num_tokens", [0, 1, 10_000])
def test_more_work_may_take_longer(num_tokens: int) -> None:
    limit = StepLimit(1_000_000, 1_000_000, 1e9)
    assert LEAST_S < limit.seconds(num_tokens) < limit.seconds(num_tokens + 1)
