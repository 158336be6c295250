"""vLLM's public Python API, by the names of its arguments; `generate` takes time on a made clock.

Names are those that vllm/engine/arg_utils.py, vllm/entrypoints/llm.py and vllm/sampling_params.py
have had from 0.10 on. A step's seconds are known: FIXED, LAYER for every layer, TOKEN for every
prompt token and READ for every token attended to by a decoding request, in every layer. Several
GPUs share all of a layer, and add a SUM to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FIXED, LAYER, TOKEN, READ = 1e-3, 3e-4, 1e-6, 1e-9
SUM = 1e-5
VERSION = "0.0.double"

_ENGINE = {
    *("model", "skip_tokenizer_init", "tokenizer", "dtype", "quantization", "load_format", "seed"),
    *("kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "tensor_parallel_size"),
}
_SAMPLING = {"temperature", "top_p", "top_k", "max_tokens", "min_tokens", "ignore_eos"}
_SAMPLING |= {"detokenize", "seed", "stop", "stop_token_ids", "n"}


@dataclass(slots=True)
class Clock:
    seconds: float = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass(slots=True)
class Calls:
    """Every engine's arguments with its number of layers; every `generate`: layers, requests,
    tokens of a prompt, tokens asked for."""

    engines: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    generated: list[tuple[int, int, int, int]] = field(default_factory=list)


def make_vllm(clock: Clock, calls: Calls) -> ModuleType:
    class SamplingParams:
        def __init__(self, **named: Any) -> None:
            assert named.keys() <= _SAMPLING, named.keys() - _SAMPLING
            assert named["temperature"] == 0.0, "greedy"
            assert named["ignore_eos"], "an answer could end early"
            self.max_tokens: int = named["max_tokens"]

    class LLM:
        def __init__(self, model: str, **named: Any) -> None:
            assert named.keys() <= _ENGINE, named.keys() - _ENGINE
            assert named["skip_tokenizer_init"], "the folder holds no tokenizer"
            config = json.loads((Path(model) / "config.json").read_text())
            assert config["architectures"] == ["Qwen2ForCausalLM"]
            assert config["model_type"] == "qwen2"
            self.num_layers: int = config["num_hidden_layers"]
            self.vocab_size: int = config["vocab_size"]
            self.limits = named
            self.num_gpus: int = named["tensor_parallel_size"]
            assert config["num_key_value_heads"] % self.num_gpus == 0, "vLLM would repeat them"
            calls.engines.append((self.num_layers, named | {"config": config}))

        def __del__(self) -> None:
            print("the engine's process has ended")

        def generate(
            self, prompts: Any, sampling_params: SamplingParams, *, use_tqdm: bool = True
        ) -> list[Any]:
            lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
            for prompt in prompts:
                assert prompt.keys() == {"prompt_token_ids"}
                assert max(prompt["prompt_token_ids"]) < self.vocab_size
            assert len(lengths) <= self.limits["max_num_seqs"]
            assert max(lengths) + sampling_params.max_tokens <= self.limits["max_model_len"]
            call = (self.num_layers, len(lengths), lengths[0], sampling_params.max_tokens)
            calls.generated.append(call)
            self._pass_time(lengths, sampling_params.max_tokens)
            return [_answer([0] * sampling_params.max_tokens) for _ in prompts]

        def _pass_time(self, lengths: list[int], num_tokens: int) -> None:
            """Steps of decoding requests first, then of chunks of prompts up to the limit."""
            left, made = list(lengths), [0] * len(lengths)
            while min(made) < num_tokens:
                budget = self.limits["max_num_batched_tokens"]
                seconds = LAYER * self.num_layers
                for i, length in enumerate(lengths):
                    if left[i] == 0 and made[i] < num_tokens:
                        seconds += READ * self.num_layers * (length + made[i])
                        made[i] += 1
                        budget -= 1
                for i in range(len(lengths)):
                    chunk = min(left[i], budget)
                    left[i] -= chunk
                    budget -= chunk
                    seconds += TOKEN * self.num_layers * chunk
                    made[i] += chunk > 0 and left[i] == 0
                sums = SUM * self.num_layers if self.num_gpus > 1 else 0.0
                clock.sleep(FIXED + seconds / self.num_gpus + sums)

    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    module.__version__ = VERSION  # type: ignore[attr-defined]
    return module


def _answer(token_ids: list[int]) -> Any:
    @dataclass(frozen=True, slots=True)
    class Completion:
        token_ids: list[int]

    @dataclass(frozen=True, slots=True)
    class Answer:
        outputs: list[Completion]

    return Answer([Completion(token_ids)])
