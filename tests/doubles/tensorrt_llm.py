"""TensorRT-LLM 1.2.1 by its signatures: a builder that checks, and an Executor that computes.

An engine of this double names its checkpoint; the Executor runs the torch executor on it and reads
nothing but the requests' ids, tables, extra ids and settings, so a wrong one shows in the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.doubles import api
from tests.doubles.cuda import CudaDouble
from tests.doubles.executor import make_executor_module
from tests.doubles.tensorrt import make_tensorrt
from tests.reference.tensorrt_llm_tensors import expected_tensors, has_fp8_head, stored_tensors
from tests.support.modules import importable

VERSION = "1.2.1"


@dataclass(slots=True)
class Doubles:
    """What a test may look at or turn: the calls, and what the Executor does next."""

    gpu: CudaDouble
    tensorrt: ModuleType
    tensorrt_llm: ModuleType
    builds: list[dict[str, Any]]
    executor: Any


@contextmanager
def installed(rtx: Any, num_gpus: int = 8, memory_bytes: int = 80 << 30) -> Iterator[Doubles]:
    """`import tensorrt`, `import tensorrt_llm` and device "cuda" work inside this block."""
    with CudaDouble(num_gpus, memory_bytes) as gpu:
        builds: list[dict[str, Any]] = []
        executor = make_executor_module(gpu)
        modules = _modules(builds, executor)
        modules["tensorrt"] = make_tensorrt(rtx, gpu)
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)
        with importable(modules):
            yield Doubles(gpu, modules["tensorrt"], modules["tensorrt_llm"], builds, executor)


def _modules(builds: list[dict[str, Any]], executor: ModuleType) -> dict[str, ModuleType]:
    names = (
        *("", ".builder", ".plugin", ".commands", ".commands.build", ".models"),
        *(".models.modeling_utils", ".bindings"),
    )
    modules = {f"tensorrt_llm{name}": ModuleType(f"tensorrt_llm{name}") for name in names}
    modules["tensorrt_llm.bindings.executor"] = executor
    modules["tensorrt_llm"].__version__ = VERSION  # type: ignore[attr-defined]
    modules["tensorrt_llm.bindings"].executor = executor  # type: ignore[attr-defined]
    build_config, plugin_config = _build_config_class(), _plugin_config_class()
    modules["tensorrt_llm.builder"].BuildConfig = build_config  # type: ignore[attr-defined]
    modules["tensorrt_llm.plugin"].PluginConfig = plugin_config  # type: ignore[attr-defined]
    modules["tensorrt_llm.models.modeling_utils"].PretrainedConfig = (  # type: ignore[attr-defined]
        PretrainedConfig
    )

    @api.function("tensorrt_llm.commands.build.parallel_build")
    def parallel_build(**given: Any) -> None:
        assert isinstance(given["model_config"], PretrainedConfig)
        assert isinstance(given["build_config"], build_config)
        assert isinstance(given["build_config"].plugin_config, plugin_config)
        assert isinstance(given["ckpt_dir"], str), "os.path.join is called on it"
        assert isinstance(given["output_dir"], str)
        assert 1 <= given["workers"] <= torch.cuda.device_count()
        print("[TensorRT-LLM] what it says on stdout")
        _build(**given)
        builds.append(given)

    modules["tensorrt_llm.commands.build"].parallel_build = (  # type: ignore[attr-defined]
        parallel_build
    )
    return modules


def _build_config_class() -> type:
    class BuildConfig(api.value_class("tensorrt_llm.builder.BuildConfig")):  # type: ignore[misc]
        def __init__(self, **named: Any) -> None:
            super().__init__(**named)
            if not isinstance(self.output_timing_cache, str):
                raise ValueError("output_timing_cache: Input should be a valid string")

    return BuildConfig


def _plugin_config_class() -> type:
    symbol = "tensorrt_llm.plugin.PluginConfig"

    class PluginConfig(api.value_class(symbol)):  # type: ignore[misc]
        """Pydantic's with extra="ignore": an unknown name is dropped without a word."""

        model_fields = dict.fromkeys(api.signature(symbol).parameters)

        def __init__(self, **named: Any) -> None:
            super().__init__(**{name: named[name] for name in self.model_fields if name in named})
            for name, choices in api.manifest()[symbol]["choices"].items():
                if vars(self)[name] not in choices:
                    raise ValueError(f"{name}: Input should be one of {choices}")

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return self.dtype if isinstance(value, str) and value == "auto" else value

    return PluginConfig


class PretrainedConfig:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @staticmethod
    def from_json_file(config_file: str) -> PretrainedConfig:
        assert isinstance(config_file, str)
        values = json.loads(Path(config_file).read_text())
        required = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "qwen_type")
        missing = [name for name in (*required, "seq_length") if name not in values]
        if missing:
            raise AttributeError(f"PretrainedConfig has no {missing}")
        assert values["architecture"] in api.manifest()["tensorrt_llm.models.MODEL_MAP"]["members"]
        return PretrainedConfig(values)


def _build(
    *, model_config: PretrainedConfig, ckpt_dir: str, build_config: Any, output_dir: str, **_: Any
) -> None:
    """Checks what the builder would trip over, then names the checkpoint in every engine."""
    values = model_config.values
    world_size = values["mapping"]["world_size"]
    _check_plugins(build_config, values)
    most = build_config.max_batch_size * build_config.max_seq_len
    if build_config.max_num_tokens > most:
        print(f"[TensorRT-LLM] [W] max_num_tokens is clipped to {most}")
        build_config.max_num_tokens = most
    for rank in range(world_size):
        _check_tensors(Path(ckpt_dir) / f"rank{rank}.safetensors", values, rank)
        engine = {"checkpoint_dir": str(Path(ckpt_dir).resolve()), "rank": rank}
        (Path(output_dir) / f"rank{rank}.engine").write_text(json.dumps(engine))
    plain = {
        name: value
        for name, value in vars(build_config).items()
        if isinstance(value, (int, str, bool, type(None)))
    }
    config = {
        "version": VERSION,
        # As TensorRT-LLM writes it: the checkpoint's keys and more of its own.
        "pretrained_config": {**values, "runtime_defaults": None, "has_partial_lora_mask": False},
        "build_config": {**plain, "plugin_config": vars(build_config.plugin_config)},
    }
    (Path(output_dir) / "config.json").write_text(json.dumps(config))


def _check_plugins(build_config: Any, values: dict[str, Any]) -> None:
    plugins = build_config.plugin_config
    assert build_config.max_prompt_embedding_table_size > 0, "prompt tuning would not be built"
    assert plugins.dtype == values["dtype"]
    cache = build_config.output_timing_cache
    assert cache != "model.cache", "written into the working directory"
    Path(cache).write_bytes(b"timings")
    if plugins.low_latency_gemm_plugin:
        assert plugins.gemm_plugin is None, "the low-latency plugin would take precedence"
    if plugins.gemm_swiglu_plugin or plugins.low_latency_gemm_swiglu_plugin:
        assert plugins.use_fused_mlp, "both need the fused MLP"
        assert values["quantization"]["quant_algo"] == "FP8"
    if plugins.use_fp8_context_fmha:
        assert values["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert (plugins.nccl_plugin is not None) == (values["mapping"]["world_size"] > 1)
    assert not (plugins.multiple_profiles and build_config.opt_num_tokens)


def _check_tensors(path: Path, values: dict[str, Any], rank: int) -> None:
    """Against an independent list of what QWenForCausalLM reads."""
    mapping, quantization = values["mapping"], values["quantization"]
    expected = expected_tensors(
        values,
        mapping["tp_size"],
        mapping["pp_size"],
        rank,
        fp8=quantization["quant_algo"] == "FP8",
        kv_fp8=quantization["kv_cache_quant_algo"] == "FP8",
        fp8_head=has_fp8_head(quantization),
    )
    assert stored_tensors(path) == expected, f"{path.name} does not hold what QWenForCausalLM reads"
