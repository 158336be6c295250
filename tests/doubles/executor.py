"""`tensorrt_llm.bindings.executor`: the C++ Executor, computed by the torch executor.

It sees ids, tables, extra ids and settings of requests, nothing of the product. Blocks of its KV
cache are known by (token id, extra id), as TensorRT-LLM hashes them: two prompts that agree there
but not in their tables would share blocks, which fails.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.inputs.tokenizer import Tokenizer as ProductTokenizer
from nvlm.planning.limits import EngineLimits
from runtime.decoder.executor import DecoderRequest, StepOutput
from runtime.decoder.guidance import Guidance
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.decoder.scheduler import max_num_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.requests.guide import Guide, GuideName
from runtime.requests.sampling import SamplingParams
from tests.doubles import api
from tests.doubles.cuda import CudaDouble, CudaTensor, plain
from tests.doubles.merge import merge_ranks
from tests.doubles.ranks import Worker

_PREFIX = "tensorrt_llm.bindings.executor."
_CLASSES = (
    *("SamplingConfig", "OutputConfig", "PromptTuningConfig", "Request", "Response"),
    *("KvCacheConfig", "ParallelConfig", "SchedulerConfig", "ExecutorConfig"),
    *("GuidedDecodingConfig", "GuidedDecodingParams"),
)
_ENUMS = ("ModelType", "FinishReason", "CommunicationType", "CommunicationMode", "BatchingType")
_NESTED_ENUMS = {
    "GuidedDecodingConfig": "GuidedDecodingBackend",
    "GuidedDecodingParams": "GuideType",
}
_CPU = torch.device("cpu")
_TOP_K_MAX = 1024  # cpp/tensorrt_llm/kernels/samplingTopKKernels.h; a larger one is clipped


def make_executor_module(gpu: CudaDouble) -> ModuleType:
    """The module, with four names of ours in it.

    `executors` lists what was opened. `faults` maps a request's number (from 1) to the error that
    its response will carry. `includes_end_token` says how END_ID is given. `ranks` is this rank's
    side of tests.doubles.ranks, None where it is the only one.
    """
    module = ModuleType("tensorrt_llm.bindings.executor")
    values = {name: api.value_class(_PREFIX + name) for name in _CLASSES}
    values |= {name: api.enum_class(_PREFIX + name) for name in _ENUMS}
    for name, nested in _NESTED_ENUMS.items():
        setattr(values[name], nested, api.enum_class(f"{_PREFIX}{name}.{nested}"))
    values |= {"executors": [], "faults": {}, "includes_end_token": False, "ranks": None}

    class Executor(_Executor):
        @api.method(_PREFIX + "Executor")
        def __init__(self, model_path: Path, model_type: Any, executor_config: Any) -> None:
            assert model_type is values["ModelType"].DECODER_ONLY
            assert isinstance(executor_config, values["ExecutorConfig"])
            super().__init__(module, gpu, Path(model_path), executor_config)
            values["executors"].append(self)

    values["Executor"] = Executor
    for name, value in values.items():
        setattr(module, name, value)
    return module


class _Executor:
    def __init__(self, module: Any, gpu: CudaDouble, model_path: Path, config: Any) -> None:
        self.module, self.gpu, self.config = module, gpu, config
        engine_config = json.loads((model_path / "config.json").read_text())
        self.engine = engine_config["build_config"]
        world_size = engine_config["pretrained_config"]["mapping"]["world_size"]
        self.ranks = module.ranks
        assert (self.ranks is None) == (world_size == 1), "all ranks of an engine run together"
        self.rank = 0 if self.ranks is None else self.ranks.rank
        named = json.loads((model_path / f"rank{self.rank}.engine").read_text())
        assert named["rank"] == self.rank
        self.closed = False
        self.requests: dict[int, Any] = {}
        self.blocks: dict[tuple[tuple[int, int], ...], bytes] = {}
        self.num_reused_tokens = 0
        self._responses: list[Any] = []
        self._log_probs: dict[int, list[float]] = {}
        self._check_config(config)
        if self.can_enqueue_requests():
            checkpoint_dir = Path(named["checkpoint_dir"])
            self._torch = _load(checkpoint_dir, self._limits())
            dtype = json.loads((checkpoint_dir / "config.json").read_text())["dtype"]
            self.dtype = getattr(torch, dtype)
            with tempfile.TemporaryDirectory() as folder:
                text = config.guided_decoding_config.tokenizer_str
                (Path(folder) / "tokenizer.json").write_text(text, "utf-8")
                vocab_size = self._torch._config.decoder.vocab_size
                self._guidance = Guidance(ProductTokenizer(Path(folder)), vocab_size)
        if self.ranks is not None:
            self.ranks.open(config.gather_generation_logits)

    def _limits(self) -> EngineLimits:
        engine = self.engine
        return EngineLimits(
            max_batch_size=self.config.max_batch_size,
            max_input_len=engine["max_input_len"],
            max_seq_len=engine["max_seq_len"],
            # The runtime takes a larger value than the engine's, and ignores it.
            max_num_tokens=min(self.config.max_num_tokens, engine["max_num_tokens"]),
            max_num_images=1,
            max_multimodal_len=engine["max_prompt_embedding_table_size"],
        )

    def _check_config(self, config: Any) -> None:
        plugins, module = self.engine["plugin_config"], self.module
        assert config.max_batch_size <= self.engine["max_batch_size"]
        if config.max_num_tokens > self.engine["max_num_tokens"]:
            print("[TensorRT-LLM][WARNING] max_num_tokens is larger than the engine's")
        assert config.max_beam_width <= self.engine["max_beam_width"]
        assert isinstance(config.kv_cache_config, module.KvCacheConfig)
        assert 0 < config.kv_cache_config.free_gpu_memory_fraction < 1
        if config.kv_cache_config.enable_block_reuse or config.enable_chunked_context:
            assert plugins["use_paged_context_fmha"], "reuse and chunks need it"
        assert config.batching_type is module.BatchingType.INFLIGHT
        self._check_guided(config.guided_decoding_config)
        assert config.parallel_config.communication_mode is module.CommunicationMode.LEADER

    def _check_guided(self, config: Any) -> None:
        """xgrammar reads tokens by their place in the list, and ends at the stop tokens alone."""
        backends = self.module.GuidedDecodingConfig.GuidedDecodingBackend
        assert config.backend is backends.XGRAMMAR, "LLGuidance is not supported in C++ runtime"
        tokenizer = Tokenizer.from_str(config.tokenizer_str)
        for token, token_id in tokenizer.get_vocab().items():
            assert config.encoded_vocab[token_id] == token
        ends = [config.encoded_vocab[token_id] for token_id in config.stop_token_ids]
        assert ends == ["<|im_end|>"]

    @api.method(_PREFIX + "Executor.can_enqueue_requests")
    def can_enqueue_requests(self) -> bool:
        return self.rank == 0 and not self.closed

    @api.method(_PREFIX + "Executor.enqueue_request")
    def enqueue_request(self, request: Any) -> int:
        self._alive()
        assert isinstance(request, self.module.Request)
        number = len(self.requests) + 1
        self.requests[number] = request
        if number in self.module.faults:
            message = self.module.faults[number]
            response = SimpleNamespace(request_id=number, has_error=lambda: True, error_msg=message)
            self._responses.append(response)
            return number
        found = self._torch.submit(self._read(request))
        assert found == number - sum(fault < number for fault in self.module.faults)
        self._ids = getattr(self, "_ids", {})
        self._ids[found] = number
        return number

    @api.method(_PREFIX + "Executor.await_responses")
    def await_responses(self, timeout: timedelta | None) -> list[Any]:
        self._alive()
        assert isinstance(timeout, timedelta), "std::chrono::milliseconds comes from a timedelta"
        if self.ranks is not None:
            self.ranks.step()
        responses, self._responses = self._responses, []
        return responses + [self._response(output) for output in self._torch.step()]

    @api.method(_PREFIX + "Executor.cancel_request")
    def cancel_request(self, id: int | None) -> None:  # noqa: A002
        """A last response says so, as the real one does."""
        self._alive()
        assert isinstance(id, int)
        for ours, number in self._ids.items():
            if number == id:
                self._torch.cancel(ours)
        reasons = [self.module.FinishReason.CANCELLED]
        self._responses.append(_response(id, [], reasons, is_final=True))

    @api.method(_PREFIX + "Executor.shutdown")
    def shutdown(self) -> None:
        """On a rank that does not lead: waits until the leader's is called."""
        if isinstance(self.ranks, Worker):
            self.ranks.serve()
        elif self.ranks is not None and not self.closed:
            self.ranks.close()
        self.closed = True

    def _alive(self) -> None:
        if self.closed:
            raise RuntimeError("Shutdown called")
        if self.rank != 0:
            raise RuntimeError("only the leader takes requests")

    def _response(self, output: StepOutput) -> Any:
        """A stop word is one of the tokens, the end id is not; logits have a row for each token."""
        number, reasons = self._ids[output.request_id], self.module.FinishReason
        if output.error is not None:
            message = f"xgrammar: {output.error}"
            return SimpleNamespace(request_id=number, has_error=lambda: True, error_msg=message)
        request = self.requests[number]
        # The torch executor knows the end id only where min_tokens holds it back.
        token_id = request.end_id if output.token_id is None else output.token_id
        assert token_id is not None
        tokens, is_final = [token_id], output.finish_reason is not None
        reason = reasons.LENGTH if is_final else reasons.NOT_FINISHED
        if output.finish_reason == "stop":  # its guide has ended, and the end id would follow
            reason = reasons.END_ID
        if token_id == request.end_id:
            reason = reasons.END_ID
            tokens = tokens if self.module.includes_end_token else []
        elif tokens in (request.stop_words or []):
            reason = reasons.STOP_WORDS
        if reason in (reasons.END_ID, reasons.STOP_WORDS) and not is_final:
            self._torch.cancel(output.request_id)
            is_final = True
        logits = None if output.logits is None else output.logits[None, None][: len(tokens)]
        response = _response(number, tokens, [reason], is_final, logits)
        if request.output_config.return_log_probs:
            found = self._log_probs.setdefault(number, [])
            if output.logprobs is not None:
                found.append(output.logprobs.logprob)
            response.result.log_probs = [list(found)]
        return response

    def _read(self, request: Any) -> DecoderRequest:
        """The request as far as the engine can see it."""
        ids, extra = request.input_token_ids, None
        assert all(type(token_id) is int for token_id in ids)
        assert len(ids) <= self.engine["max_input_len"]
        assert len(ids) + request.max_tokens <= self.engine["max_seq_len"], "no room for it"
        table = None
        if request.prompt_tuning_config is not None:
            table = self._read_table(request.prompt_tuning_config.embedding_table)
            extra = request.prompt_tuning_config.input_token_extra_ids
            assert extra is not None, "reuse of KV blocks would confuse pictures"
            assert len(extra) == len(ids), "one for every token"
            self._check_reuse(ids, extra, table)
        assert all(len(word) == 1 for word in request.stop_words or [])
        output = request.output_config
        assert output.exclude_input_from_output, "the prompt would come back"
        assert request.streaming, "tokens would come at the end only"
        if output.return_generation_logits:
            assert self.config.gather_generation_logits, "the runtime gathers none"
        sampling = _sampling(request.sampling_config)
        return DecoderRequest(
            token_ids=ids,
            max_new_tokens=request.max_tokens,
            prompt_table=table,
            stop_ids=frozenset({request.end_id} if sampling.min_tokens else ()),
            sampling=replace(
                sampling,
                logit_bias=self._read_bias(request.embedding_bias),
                logprobs=bool(output.return_log_probs),
            ),
            bad_words=tuple(map(tuple, request.bad_words or ())),
            return_logits=bool(output.return_generation_logits),
            **self._guide(request.guided_decoding_params),
        )

    def _read_bias(self, bias: Any) -> dict[int, float]:
        if bias is None:
            return {}
        assert bias.shape == (self._torch._config.decoder.vocab_size,)
        if bias.dtype != torch.float32:
            raise RuntimeError("Embedding bias data type must be same as model logits type.")
        return {int(token_id): float(bias[token_id]) for token_id in bias.nonzero().flatten()}

    def _guide(self, params: Any) -> dict[str, Any]:
        """xgrammar is another library; here what the torch executor has stands for it."""
        if params is None:
            return {}
        types = self.module.GuidedDecodingParams.GuideType
        names: dict[Any, GuideName] = {types.JSON_SCHEMA: "json_schema", types.REGEX: "regex"}
        guide = Guide(names[params.guide_type], params.guide)
        return {"guide": guide, "compiled_guide": self._guidance.compile(guide)}

    def _read_table(self, table: Any) -> torch.Tensor:
        assert isinstance(table, CudaTensor), "the table has to be on the GPU"
        assert not self.gpu.is_busy, "another stream would read the table before it is written"
        values: torch.Tensor = plain(table)
        if values.dtype != self.dtype:
            raise RuntimeError(
                "Request embedding table data type doesn't match model weight data type."
            )
        assert values.ndim == 2, "Expected prompt embedding table to have shape [rows, hidden]"
        assert values.is_contiguous()
        size = self.engine["max_prompt_embedding_table_size"] // self.engine["max_batch_size"]
        assert len(values) <= size, f"{len(values)} rows, the runtime allocates {size} a request"
        return values.clone()

    def _check_reuse(self, ids: list[int], extra: list[int], table: torch.Tensor) -> None:
        vocab_size = self._torch._config.decoder.vocab_size
        for token_id, number in zip(ids, extra, strict=True):
            assert (number != 0) == (token_id >= vocab_size), "text is 0, a picture never"
            assert 0 <= number < 2**64
        block = self.engine["plugin_config"]["tokens_per_block"]
        for end in range(block, len(ids), block):
            key = tuple(zip(ids[:end], extra[:end], strict=True))
            rows = [table[i - vocab_size] for i in ids[:end] if i >= vocab_size]
            content = torch.stack(rows).float().numpy().tobytes() if rows else b""
            assert self.blocks.setdefault(key, content) == content, "blocks of two pictures mixed"


def _response(
    number: int, tokens: list[int], reasons: list[Any], is_final: bool, logits: Any = None
) -> Any:
    result = SimpleNamespace(
        is_final=is_final,
        output_token_ids=[tokens],
        finish_reasons=reasons,
        generation_logits=logits,
    )
    return SimpleNamespace(request_id=number, has_error=lambda: False, result=result)


def _sampling(config: Any) -> SamplingParams:
    """Penalties as ours, whose order differs: the real ones come after the temperature, and count
    the prompt (cpp/tensorrt_llm/kernels/penaltyKernels.cu)."""
    assert config.beam_width == 1
    names = ("min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_p")
    given = {name: vars(config)[name] for name in names if vars(config)[name] is not None}
    assert given.get("min_tokens", 0) >= 0, "cpp/tensorrt_llm/executor/samplingConfig.cpp"
    assert given.get("repetition_penalty", 1.0) > 0.0
    if config.top_k == 1:
        return SamplingParams(**given)
    top_k = min(config.top_k, _TOP_K_MAX)
    return SamplingParams(config.temperature, top_k, config.top_p, config.seed, **given)


def _load(checkpoint_dir: Path, limits: EngineLimits) -> TorchDecoderExecutor:
    """The checkpoint on one rank, whatever ranks it is divided into."""
    values = json.loads((checkpoint_dir / "config.json").read_text())
    directory = checkpoint_dir
    with tempfile.TemporaryDirectory() as folder:
        if values["mapping"]["world_size"] > 1:
            directory = Path(folder)
            merge_ranks(checkpoint_dir, values, directory / "rank0.safetensors")
            values["mapping"] |= {"world_size": 1, "tp_size": 1, "pp_size": 1}
        config = CheckpointConfig.from_json(values, directory)
        weights = load_weights(open_weights(directory, config), config, _CPU)
    num_blocks = max_num_blocks(limits)
    model = PlainModel(config, weights, num_blocks, _CPU)
    return TorchDecoderExecutor(config, limits, model, num_blocks)
