"""What a request says beside its tensors: nothing, or what Triton itself reads.

Triton's HTTP endpoint `generate` makes a parameter of every JSON key that is no input. A client's
misspelt setting, or a picture under another server's name, would be dropped without a word.
"""

from __future__ import annotations

import json

from frontends.triton.signature import NVLM_INPUTS
from nvlm.program.errors import UserError, cut
from nvlm.program.nearest import nearest

# Beside the protocols' own: Triton's parameters extension.
_TRITONS = {"id", "binary_data_output", "headers", "priority", "timeout"}
_TRITONS |= {"sequence_id", "sequence_start", "sequence_end"}
_TRITONS_PREFIX = "triton_"

_OTHER_WORDS = {
    # pictures
    "image": "image_base64",
    "images": "image_base64",
    "image_data": "image_base64",
    "multi_modal_data": "image_base64",
    "image_url": "image_url_input",
    # the question
    "prompt": "text_input",
    "question": "text_input",
    "text": "text_input",
    "inputs": "text_input",
    "system_prompt": "system",
    # settings
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_output_len": "max_tokens",
    "request_output_len": "max_tokens",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "eos_token_id": "end_id",
    "random_seed": "seed",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "num_beams": "beam_width",
    "num_return_sequences": "n",
    "best_of": "n",
    "logprobs": "return_log_probs",
    "bad_words_list": "bad_words",
    "embedding_bias": "logit_bias",
    "json_schema": "guided_decoding_guide",
    "regex": "guided_decoding_guide",
    "choice": "guided_decoding_guide",
    "grammar": "guided_decoding_guide",
    "json_object": "guided_decoding_guide_type",
    "stop": "stop_words",
    "stop_sequences": "stop_words",
    "streaming": "stream",
}
"""What run.py, TensorRT-LLM's engine and other servers call an input."""


def refuse_unknown(parameters: str) -> None:
    """parameters: the request's, as a JSON object. Raises `UserError` for one that nobody reads."""
    names = {spec.name for spec in NVLM_INPUTS}
    for name in json.loads(parameters or "{}"):
        if name in _TRITONS or name.startswith(_TRITONS_PREFIX):
            continue
        if name in names:
            raise UserError(
                f"{name} came as a parameter, where nobody reads it; send it as an input of the "
                "model nvlm"
            )
        raise UserError(
            f"{cut(name)} is no input of this server"
            f"{nearest(name, names, _OTHER_WORDS) or '; docs/triton.md lists them'}"
        )
