"""`DecoderExecutor` on TensorRT-LLM's C++ Executor: in-flight batching, paged KV cache with reuse.

Rank 0 leads: requests go in and tokens come out there, and the Executor talks to the other ranks
over MPI. Nothing but token ids, tables, extra ids and settings is passed to it.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch

from nvlm.formats import layout
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.planning.memory_plan import KV_CACHE_FREE_GPU_MEMORY_FRACTION
from nvlm.planning.tensorrt_llm_package import load_tensorrt_llm, stdout_to_stderr
from nvlm.program.errors import UserError
from runtime.decoder.executor import (
    DecoderOptions,
    DecoderRequest,
    StepOutput,
    TokenLogprobs,
    check_request,
)
from runtime.decoder.tensorrt_llm_dialect import (
    XgrammarTokenizer,
    embedding_bias,
    end_and_stop_ids,
    extra_ids,
    guide_words,
    prompt_table,
    sampling_keywords,
)
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import FinishReason

_POLL = timedelta(milliseconds=500)  # between looks at Control-C; responses come at once


class TensorrtLlmDecoderExecutor:
    def __init__(self, engine: EngineDir, device: torch.device, options: DecoderOptions) -> None:
        load_tensorrt_llm()
        with stdout_to_stderr():
            from tensorrt_llm.bindings import executor as trtllm

            self._trtllm: Any = trtllm
            self.limits = engine.limits
            self._config = engine.checkpoint_config
            self._dtype = TORCH_DTYPES[self._config.dtype]
            self._device = device
            self._executor: Any = trtllm.Executor(
                engine.directory / layout.LLM,
                trtllm.ModelType.DECODER_ONLY,
                executor_config(trtllm, engine, options),
            )
        self._requests: dict[int, DecoderRequest] = {}

    def submit(self, request: DecoderRequest) -> int:
        decoder = self._config.decoder
        check_request(request, self.limits, decoder.vocab_size, decoder.hidden_size)
        num_rows = 0 if request.prompt_table is None else len(request.prompt_table)
        max_rows = self.limits.max_multimodal_len // self.limits.max_batch_size
        if num_rows > max_rows:
            raise UserError(
                f"the prompt table has {num_rows} rows, the engine takes {max_rows} a request; "
                "build it with a larger --max_num_images"
            )
        request_id = int(self._executor.enqueue_request(self._to_trtllm(request)))
        self._requests[request_id] = request
        return request_id

    def step(self) -> list[StepOutput]:
        """What has come since the last call, at least one token; a response may hold several."""
        while self._requests:
            responses = self._executor.await_responses(timeout=_POLL)
            outputs = [output for response in responses for output in self._take(response)]
            if outputs:
                return outputs
        return []

    def cancel(self, request_id: int) -> None:
        if self._requests.pop(request_id, None) is not None:
            self._executor.cancel_request(request_id)

    def work(self) -> None:
        """On the other ranks, instead of all above: their part of every step until rank 0 closes.
        (`shutdown` joins the executor's thread, which ends when the leader's last message comes.)
        """
        assert not self._executor.can_enqueue_requests(), "the leader does not wait"
        self._executor.shutdown()

    def close(self) -> None:
        """Gives the GPU back: weights and KV cache live as long as the Executor object does, and
        its shutdown would wait for the answers in flight."""
        for request_id in list(self._requests):
            self.cancel(request_id)
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None

    def _to_trtllm(self, request: DecoderRequest) -> Any:
        trtllm, table = self._trtllm, prompt_table(request, self._dtype)
        prompt_tuning = None
        if table is not None:
            table = table.to(self._device)
            # The Executor reads it on streams of its own, which do not wait for torch's.
            torch.cuda.current_stream(self._device).synchronize()
            prompt_tuning = trtllm.PromptTuningConfig(
                embedding_table=table,
                input_token_extra_ids=extra_ids(request, self._config.decoder.vocab_size),
            )
        end_id, stop_ids = end_and_stop_ids(request)
        bias = embedding_bias(request.sampling, self._config.decoder.vocab_size)
        room = self.limits.max_seq_len - len(request.token_ids)
        return trtllm.Request(
            input_token_ids=list(request.token_ids),
            max_tokens=min(request.max_new_tokens, room),
            streaming=True,
            sampling_config=trtllm.SamplingConfig(
                beam_width=1, **sampling_keywords(request.sampling)
            ),
            output_config=trtllm.OutputConfig(
                exclude_input_from_output=True,
                return_generation_logits=request.return_logits,
                return_log_probs=request.sampling.logprobs,
            ),
            end_id=end_id,
            bad_words=[list(word) for word in request.bad_words] or None,
            embedding_bias=bias,
            stop_words=[[token_id] for token_id in stop_ids] or None,
            prompt_tuning_config=prompt_tuning,
            guided_decoding_params=self._guide(request),
        )

    def _guide(self, request: DecoderRequest) -> Any:
        if request.guide is None:
            return None
        params = self._trtllm.GuidedDecodingParams
        guide_type, text = guide_words(request.guide)
        return params(getattr(params.GuideType, guide_type), text)

    def _take(self, response: Any) -> list[StepOutput]:
        request_id = int(response.request_id)
        request = self._requests.get(request_id)
        if request is None:  # cancelled; what was on its way is dropped
            return []
        if response.has_error():
            del self._requests[request_id]
            reason = f"the decoder gave the request up: {response.error_msg}"
            return [StepOutput(request_id, None, None, error=UserError(reason))]
        outputs = self._tokens(request_id, request, response.result)
        if outputs and outputs[-1].finish_reason is not None:
            del self._requests[request_id]
            if not response.result.is_final:  # ended by a stop token that it does not know of
                self._executor.cancel_request(request_id)
        return outputs

    def _tokens(self, request_id: int, request: DecoderRequest, result: Any) -> list[StepOutput]:
        """Its new tokens, up to one that ends the answer; an end without a token has its own."""
        rows = [None] * (len(result.output_token_ids[0]) + 1)
        if request.return_logits and result.generation_logits is not None:
            # A row for each token of a streamed response, and one beam; the vocabulary is padded
            # at several ranks.
            logits = result.generation_logits.flatten(0, -2).to(torch.float32)
            rows = [*logits[:, : self._config.decoder.vocab_size], *rows]
        outputs: list[StepOutput] = []
        token_ids = result.output_token_ids[0]
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if request.sampling.logprobs and token_ids:
            # All that it has so far, of which the last are these tokens'.
            values = result.log_probs[0][-len(token_ids) :]
            logprobs = [TokenLogprobs(float(logprob)) for logprob in values]
        for token_id, row, logprob in zip(token_ids, rows, logprobs, strict=False):
            if token_id in request.stop_ids:
                return [*outputs, StepOutput(request_id, None, "stop", row)]
            outputs.append(StepOutput(request_id, int(token_id), None, row, logprob))
        if not result.is_final:
            return outputs
        if not outputs:
            return [StepOutput(request_id, None, self._finish_reason(result), rows[0])]
        return [*outputs[:-1], replace(outputs[-1], finish_reason=self._finish_reason(result))]

    def _finish_reason(self, result: Any) -> FinishReason:
        reasons = self._trtllm.FinishReason
        reason = result.finish_reasons[0]
        return "stop" if reason in (reasons.END_ID, reasons.STOP_WORDS) else "length"


def executor_config(trtllm: Any, engine: EngineDir, options: DecoderOptions) -> Any:
    """Chunked context and reuse of KV blocks stand on paged context attention, which TensorRT-LLM
    switches off for an FP8 cache without FP8 weights."""
    config, limits = engine.checkpoint_config, engine.limits
    guided = trtllm.GuidedDecodingConfig
    tokenizer = XgrammarTokenizer.read(engine.directory / layout.TOKENIZER)
    has_paged_context = config.kv_cache_quant_algo is None or config.quant_algo == "FP8"
    return trtllm.ExecutorConfig(
        max_beam_width=1,
        kv_cache_config=trtllm.KvCacheConfig(
            enable_block_reuse=has_paged_context,
            free_gpu_memory_fraction=options.kv_cache_free_gpu_memory_fraction
            or KV_CACHE_FREE_GPU_MEMORY_FRACTION,
        ),
        enable_chunked_context=has_paged_context,
        batching_type=trtllm.BatchingType.INFLIGHT,
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        parallel_config=trtllm.ParallelConfig(
            communication_type=trtllm.CommunicationType.MPI,
            communication_mode=trtllm.CommunicationMode.LEADER,
        ),
        # The C++ runtime has this one of its two backends.
        guided_decoding_config=guided(guided.GuidedDecodingBackend.XGRAMMAR, **asdict(tokenizer)),
        gather_generation_logits=options.gather_logits,
    )
