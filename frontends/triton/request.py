"""From the tensors of one request to a `GenerationRequest`.

What a client sends and we cannot do is refused by name and in one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from frontends.triton.pictures import picture_in_url, read_images
from frontends.triton.tensors import Tensors, decode, scalar, strings, text
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError, shown
from runtime.requests.fields import MOST_STOPS
from runtime.requests.guide import GUIDES, Guide
from runtime.requests.messages import ImageSource
from runtime.requests.sampling import SETTINGS, SamplingParams, with_sampling
from runtime.requests.setting import Biases, Setting, Words
from runtime.requests.types import GenerationRequest

Encode = Callable[[str], list[int]]

# What TensorRT-LLM can do and we cannot, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "decoder_text_input": (b"",),
    "video_bytes_input": (),
    "beam_width": (0, 1),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
}

_MOST_VALUES = 1000


def read_request(
    tensors: Tensors, limits: EngineLimits, encode: Encode | None = None
) -> GenerationRequest:
    """encode: the engine's tokenizer, which biases of words need.

    Raises `UserError` for what the engine cannot answer, before anything large is copied.
    """
    _refuse_unsupported(tensors)
    end_id = scalar(tensors, "end_id", -1)
    return replace(
        _asked(tensors, read_images(tensors, limits)),
        max_num_tiles=scalar(tensors, "max_num_tiles", None),
        max_new_tokens=_max_tokens(tensors),
        stop=_stop_words(tensors),
        end_ids=frozenset({end_id} if end_id >= 0 else ()),
        sampling=_sampling(tensors, encode),
        guide=_guide(tensors),
    )


def _asked(tensors: Tensors, images: tuple[ImageSource, ...]) -> GenerationRequest:
    """What is asked, by `text_input` or by `messages`, without its settings."""
    prompt = text(tensors, "text_input", "")
    system = {"system": text(tensors, "system", "")} if "system" in tensors else {}
    if messages := text(tensors, "messages", ""):
        if prompt:
            raise UserError("text_input stands beside messages; leave it empty")
        return GenerationRequest.from_messages(
            _json(messages, "messages is not JSON"), images, source=_picture_in_part, **system
        )
    if not prompt and not images:
        raise UserError("text_input is empty and there is no image; give a question")
    return GenerationRequest.images_first(prompt, images, **system)


def _json(given: str, what_is_wrong: str) -> Any:
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what_is_wrong}: {error}") from None


def _picture_in_part(url: str) -> bytes:
    return picture_in_url(url.encode(errors="surrogatepass"), "a part of messages")


def wants_stream(tensors: Tensors) -> bool:
    return bool(scalar(tensors, "stream", False))


def _stop_words(tensors: Tensors) -> tuple[str, ...]:
    words = strings(tensors, "stop_words")
    if len(words) > MOST_STOPS:
        raise UserError(f"there are {len(words)} stop_words, expected {MOST_STOPS} at most")
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
        f"guided_decoding_guide_type is {shown(guide_type)}, expected one of "
        f"{', '.join(kind.triton_type for kind in GUIDES)}"
    )


def _guide_value(name: str, given: str) -> Any:
    if name == "json_object":
        return True
    if name != "choice":
        return given
    return _json(given, "guided_decoding_guide is no JSON list of texts")


def _sampling(tensors: Tensors, encode: Encode | None) -> SamplingParams:
    """run.py's meaning, and TensorRT-LLM's of zero: top_p 0 is off, both filters 0 is greedy."""
    given = {
        setting.name: _value(tensors, setting)
        for setting in SETTINGS
        if setting.input_name in tensors
    }
    if given.get("top_k") == 0 and given.get("top_p") == 0.0:
        given["temperature"] = 0.0
    if given.get("top_p") == 0.0:
        given["top_p"] = 1.0
    if any(strings(tensors, "embedding_bias_words")):
        given["logit_bias"] = _bias_of_words(tensors, encode, dict(given.get("logit_bias", ())))
    return with_sampling(SamplingParams(), given)


def _value(tensors: Tensors, setting: Setting) -> Any:
    name = setting.input_name
    if isinstance(setting, Words):
        return setting.read([decode(word, name) for word in strings(tensors, name) if word])
    if isinstance(setting, Biases):
        given = decode(scalar(tensors, name, b""), name)
        return setting.read(_json(given or "{}", f"{name} is not JSON"))
    return scalar(tensors, name, None)


def _bias_of_words(
    tensors: Tensors, encode: Encode | None, biases: dict[int, float]
) -> dict[int, float]:
    """TensorRT-LLM's: a weight is added to every token of its word."""
    if encode is None:
        raise UserError("embedding_bias_words needs the tokenizer; give logit_bias by token ids")
    words = strings(tensors, "embedding_bias_words")
    weights = tensors.get("embedding_bias_weights", np.empty(0)).reshape(-1).tolist()
    if len(words) != len(weights):
        raise UserError(
            f"there are {len(words)} embedding_bias_words and {len(weights)} "
            "embedding_bias_weights, expected as many"
        )
    for word, weight in zip(words, weights, strict=True):
        for token_id in encode(decode(word, "embedding_bias_words")):
            biases[token_id] = biases.get(token_id, 0.0) + weight
    return biases


def _refuse_unsupported(tensors: Tensors) -> None:
    for name, neutral in _NEUTRAL.items():
        values = tensors[name].reshape(-1) if name in tensors else ()
        # A large one is not looked through: a list of its values would be many times its size.
        if len(values) > (_MOST_VALUES if neutral else 0) or any(v not in neutral for v in values):
            raise UserError(f"{name} is not supported by this server; leave it out")
