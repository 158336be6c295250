"""The tensors clients send and receive, as tables.

Names, types and shapes (without the batch dimension) of TensorRT-LLM 1.2.1's multimodal
`ensemble`, then what only `nvlm` has: inputs of its own and the sampling settings that `ensemble`
does not know. One row feeds the rendered config.pbtxt of both models.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.requests.sampling import SETTINGS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model."""

    name: str  # in Triton's configuration
    data_type: str  # Triton's, such as TYPE_INT32
    dims: tuple[int, ...]  # -1 is free
    optional: bool = True  # a request may leave it out


def _specs(data_type: str, dims: tuple[int, ...], names: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, data_type, dims) for name in names.split())


ENSEMBLE_INPUTS = (
    TensorSpec("text_input", "TYPE_STRING", (1,), optional=False),
    TensorSpec("max_tokens", "TYPE_INT32", (1,), optional=False),
    *_specs("TYPE_STRING", (1,), "decoder_text_input"),
    *_specs("TYPE_FP16", (-1, -1, -1, -1), "image_input"),
    *_specs("TYPE_UINT8", (-1, -1, -1, -1), "image_bytes_input video_bytes_input"),
    *_specs("TYPE_INT64", (-1, 2), "image_sizes_input"),
    *_specs("TYPE_STRING", (-1,), "image_url_input bad_words stop_words embedding_bias_words"),
    *_specs("TYPE_INT32", (1,), "end_id pad_id top_k min_tokens beam_width"),
    *_specs(
        "TYPE_FP32",
        (1,),
        "top_p temperature length_penalty repetition_penalty presence_penalty frequency_penalty",
    ),
    *_specs("TYPE_FP32", (-1,), "embedding_bias_weights"),
    *_specs("TYPE_UINT64", (1,), "seed prompt_table_extra_id"),
    *_specs(
        "TYPE_BOOL", (1,), "return_log_probs return_context_logits return_generation_logits stream"
    ),
)

NVLM_INPUTS = (
    *ENSEMBLE_INPUTS,
    *_specs("TYPE_STRING", (-1,), "image_bytes image_base64"),
    *_specs("TYPE_STRING", (1,), "system messages"),
    *_specs("TYPE_INT32", (1,), "max_num_tiles"),
    # As TensorRT-LLM's own model has them, which its `ensemble` does not pass on.
    *_specs("TYPE_STRING", (1,), "guided_decoding_guide_type guided_decoding_guide"),
    *(
        TensorSpec(setting.input_name, setting.triton_type, setting.triton_dims)
        for setting in SETTINGS
        if setting.input_name not in {spec.name for spec in ENSEMBLE_INPUTS}
    ),
)

ENSEMBLE_OUTPUTS = (
    *_specs("TYPE_STRING", (-1,), "text_output"),
    *_specs("TYPE_FP32", (-1,), "cum_log_probs"),
    *_specs("TYPE_FP32", (-1, -1), "output_log_probs context_logits"),
    *_specs("TYPE_FP32", (-1, -1, -1), "generation_logits"),
    *_specs("TYPE_INT32", (1,), "batch_index sequence_index"),
)

NVLM_OUTPUTS = (
    *ENSEMBLE_OUTPUTS,
    *_specs("TYPE_STRING", (1,), "finish_reason choices logprobs prompt_logprobs"),
    *_specs("TYPE_UINT64", (1,), "seed"),
    *_specs("TYPE_INT32", (1,), "num_prompt_tokens num_tokens num_tiles"),
    *_specs("TYPE_FP32", (1,), "queue_ms tiling_ms vision_ms prefill_ms decode_ms total_ms"),
)


def to_pbtxt(field: str, specs: tuple[TensorSpec, ...]) -> str:
    """The `input` or `output` blocks of a config.pbtxt."""
    return "\n".join(
        f'{field} {{ name: "{spec.name}" data_type: {spec.data_type} dims: {list(spec.dims)}'
        + (" optional: true }" if field == "input" and spec.optional else " }")
        for spec in specs
    )


def identity_map(field: str, specs: tuple[TensorSpec, ...]) -> str:
    """An ensemble step's `input_map` or `output_map` that keeps every name."""
    return "\n".join(
        f'      {field} {{ key: "{spec.name}" value: "{spec.name}" }}' for spec in specs
    )
