"""From the tensors of one request to a `GenerationRequest`.

What a client sends and we cannot do is refused by name and in one sentence.
"""

from __future__ import annotations

import json
from typing import Any

from frontends.triton.pictures import read_images
from frontends.triton.tensors import Tensors, decode, scalar, strings, text
from nvlm.inputs.prompt import DEFAULT_SYSTEM
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from runtime.requests.guide import GUIDES, Guide
from runtime.requests.sampling import SETTINGS, SamplingParams, with_sampling
from runtime.requests.types import GenerationRequest

# What TensorRT-LLM can do and we cannot, unless the table of sampling settings has it, and the
# values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "decoder_text_input": (b"",),
    "video_bytes_input": (),
    "bad_words": (b"",),
    "embedding_bias_words": (b"",),
    "embedding_bias_weights": (0.0,),
    "min_tokens": (0, 1),
    "beam_width": (0, 1),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "return_log_probs": (False,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
}

_MOST_VALUES = 1000
MAX_STOP_WORDS = 64
"""Every token is searched for each of them while all other requests wait."""


def read_request(tensors: Tensors, limits: EngineLimits) -> GenerationRequest:
    """Raises `UserError` for what the engine cannot answer, before anything large is copied."""
    _refuse_unsupported(tensors)
    prompt = text(tensors, "text_input", "")
    images = read_images(tensors, limits)
    if not prompt and not images:
        raise UserError("text_input is empty and there is no image; give a question")
    end_id = scalar(tensors, "end_id", -1)
    return GenerationRequest.images_first(
        prompt,
        images,
        system=text(tensors, "system", DEFAULT_SYSTEM),
        max_num_tiles=scalar(tensors, "max_num_tiles", None),
        max_new_tokens=_max_tokens(tensors),
        stop=_stop_words(tensors),
        end_ids=frozenset({end_id} if end_id >= 0 else ()),
        sampling=_sampling(tensors),
        guide=_guide(tensors),
    )


def wants_stream(tensors: Tensors) -> bool:
    return bool(scalar(tensors, "stream", False))


def _stop_words(tensors: Tensors) -> tuple[str, ...]:
    words = strings(tensors, "stop_words")
    if len(words) > MAX_STOP_WORDS:
        raise UserError(f"there are {len(words)} stop_words, expected {MAX_STOP_WORDS} at most")
    return tuple(decode(word, "stop_words") for word in words)


def _max_tokens(tensors: Tensors) -> int:
    value: int = scalar(tensors, "max_tokens", 0)
    if value < 1:
        raise UserError(f"max_tokens is {value}, expected 1 or more")
    return value


def _guide(tensors: Tensors) -> Guide | None:
    """TensorRT-LLM's two tensors; a choice's texts are a JSON list."""
    guide_type = text(tensors, "guided_decoding_guide_type", "")
    given = text(tensors, "guided_decoding_guide", "")
    if not guide_type:
        if given:
            raise UserError("guided_decoding_guide is given without guided_decoding_guide_type")
        return None
    for kind in GUIDES:
        if kind.triton_type == guide_type:
            return Guide.of(kind.name, _guide_value(kind.name, given))
    raise UserError(
        f"guided_decoding_guide_type is {guide_type!r}, expected one of "
        f"{', '.join(kind.triton_type for kind in GUIDES)}"
    )


def _guide_value(name: str, given: str) -> Any:
    if name == "json_object":
        return True
    if name != "choice":
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise UserError(f"guided_decoding_guide is no JSON list of texts: {error}") from None


def _sampling(tensors: Tensors) -> SamplingParams:
    """run.py's meaning, and TensorRT-LLM's of zero: top_p 0 is off, both filters 0 is greedy."""
    names = [setting.name for setting in SETTINGS if setting.name in tensors]
    given = {name: scalar(tensors, name, None) for name in names}
    if given.get("top_k") == 0 and given.get("top_p") == 0.0:
        return SamplingParams()
    if given.get("top_p") == 0.0:
        given["top_p"] = 1.0
    return with_sampling(SamplingParams(), given)


def _refuse_unsupported(tensors: Tensors) -> None:
    supported = {setting.name for setting in SETTINGS}
    for name, neutral in _NEUTRAL.items():
        if name in supported:
            continue
        values = tensors[name].reshape(-1) if name in tensors else ()
        # A large one is not looked through: a list of its values would be many times its size.
        if len(values) > (_MOST_VALUES if neutral else 0) or any(v not in neutral for v in values):
            raise UserError(f"{name} is not supported by this server; leave it out")
