"""--dry_run of the real 72B conversion, from config.json and the index alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from build.conversion.plan import Speeds, peak_memory_bytes, plan_conversion
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.tensor_names import model_tensors
from nvlm.model.config import NVLMConfig
from tests.support.command import CONVERT, one_line_error, run_command
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import config_json


@pytest.fixture
def index_only(tmp_path: Path) -> Path:
    """The 72B model's config.json and index, and no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    values = config_json(PRESETS["72b"])
    (folder / "config.json").write_text(json.dumps(values))
    config = NVLMConfig.from_hf(values, folder / "config.json")
    weight_map = {
        tensor.name: "model-00001-of-00046.safetensors" for tensor in model_tensors(config)
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_real_conversion_is_planned_without_a_weight_file(
    index_only: Path, tmp_path: Path
) -> None:
    flags = ("--model_dir", index_only, "--output_dir", tmp_path / "out", "--dry_run")
    result = run_command(CONVERT, *flags, "--tp_size", "2", "--pp_size", "2", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["input_bytes"] == 176_901_927_168, "metadata.total_size of the published index"
    # Half of 70.2 GB of linears a stage, halved by TP, and the whole embedding or half the head.
    assert plan["rank_bytes"] == pytest.approx([20.05e9, 20.05e9, 18.80e9, 18.80e9], rel=2e-3)
    assert plan["output_bytes"] == sum(plan["rank_bytes"]) + plan["vision_bytes"]
    assert plan["streaming_seconds"] > 0
    assert plan["calibration_seconds"] > 0
    assert plan["peak_memory_bytes"] < 6e9
    fits = {(row["gpu"], row["tp_size"]): row for row in plan["gpus"]}
    assert fits["H100 80 GB", 1]["cache_tokens"] == 0, "88.5 GB do not fit"
    assert fits["H100 80 GB", 2]["requests"]["32768"] >= 4
    assert fits["H200 141 GB", 1]["requests"]["4096"] >= 32
    assert fits["H200 141 GB", 8]["cache_tokens"] > 8 * fits["H200 141 GB", 1]["cache_tokens"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_in_fp8_is_counted(index_only: Path, tmp_path: Path) -> None:
    flags = ("--model_dir", index_only, "--output_dir", tmp_path / "out", "--dry_run")
    plans = [
        json.loads(run_command(CONVERT, *flags, "--device", "cpu", *more).stdout)
        for more in ((), ("--quantize_lm_head",))
    ]
    assert plans[0]["output_bytes"] - plans[1]["output_bytes"] == 152064 * 8192 - 8
    assert plans[0]["peak_memory_bytes"] == plans[1]["peak_memory_bytes"]


def test_a_head_in_fp8_that_is_not_published_in_dtype_is_copied_once() -> None:
    config = NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))
    peaks = [
        peak_memory_bytes(
            config,
            CheckpointConfig(config.decoder, "float32", "FP8", "FP8", quantize_lm_head=is_fp8),
            is_calibrated=True,
        )
        for is_fp8 in (False, True)
    ]
    assert peaks[0] < peaks[1]
    assert peaks[1] > 4 * 152064 * 8192


def test_an_index_without_a_tensor_is_refused(index_only: Path, tmp_path: Path) -> None:
    path = index_only / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["language_model.model.layers.79.mlp.down_proj.weight"]
    path.write_text(json.dumps({"weight_map": weight_map}))
    flags = ("--model_dir", index_only, "--output_dir", tmp_path / "out", "--dry_run")
    fragments = ("layers.79.mlp.down_proj.weight", "1 are missing", "download it again")
    one_line_error(run_command(CONVERT, *flags), *fragments)


def test_images_larger_than_the_context_are_reported_as_the_configs_mistake(
    index_only: Path, tmp_path: Path
) -> None:
    """No flag fixes it: one image is the least."""
    path = index_only / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_dynamic_patch": 200}))
    flags = ("--model_dir", index_only, "--output_dir", tmp_path / "out", "--dry_run")
    fragments = ("max_dynamic_patch 200", "config.json", "201 tiles", "32768 positions")
    line = one_line_error(run_command(CONVERT, *flags), *fragments)
    assert "--max_num_images" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_time_is_bytes_over_the_measured_speeds_and_memory_knows_no_depth() -> None:
    config = NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))
    fp8 = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8")
    plan = plan_conversion(config, fp8, 16, Speeds(2e9, 1e9, 1e12))
    expected = plan.input_bytes / 2e9 + plan.output_bytes / 1e9
    assert plan.streaming_seconds == pytest.approx(expected)
    # 2 operations for each of 70.2 billion weights and 16 * (7 * 256 + 128) tokens, and vision.
    tokens, positions = 16 * (7 * 256 + 128), 16 * 7 * 1025
    operations = 2 * (70.2e9 * tokens + 6.67e9 * positions)
    assert plan.calibration_seconds == pytest.approx(operations / 1e12, rel=0.01)
    assert plan_conversion(config, fp8, 0, Speeds(2e9, 1e9, 1e12)).calibration_seconds == 0
    assert peak_memory_bytes(config, fp8, is_calibrated=False) < 1e9
    assert "does not fit" in "\n".join(plan.lines())
