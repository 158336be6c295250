"""From the tensors of one request to a `GenerationRequest`.

What a client sends is refused by name and in one sentence. Pictures come only inside the request:
nothing is ever read from the network or a file because a client named it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm.errors import UserError
from nvlm.inputs.prompt import DEFAULT_SYSTEM
from nvlm.inputs.tiling import TiledImage, denormalize
from runtime.request_file import with_sampling
from runtime.sampling import SamplingParams
from runtime.types import GenerationRequest, ImageSource

Tensors = Mapping[str, NDArray[Any]]
"""By name, with the batch dimension, which is 1; strings are arrays of bytes."""

# What TensorRT-LLM can do and we cannot, and the values that ask for nothing.
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


def read_request(tensors: Tensors) -> GenerationRequest:
    """Raises `UserError` for what no engine of ours can answer."""
    _refuse_unsupported(tensors)
    prompt = _text(tensors, "text_input", "")
    images = _images(tensors)
    if not prompt and not images:
        raise UserError("text_input is empty and there is no image; give a question")
    end_id = _scalar(tensors, "end_id", -1)
    return GenerationRequest.images_first(
        prompt,
        images,
        system=_text(tensors, "system", DEFAULT_SYSTEM),
        max_num_tiles=_scalar(tensors, "max_num_tiles", None),
        max_new_tokens=_max_tokens(tensors),
        stop=tuple(_decode(word, "stop_words") for word in _strings(tensors, "stop_words")),
        end_ids=frozenset({end_id} if end_id >= 0 else ()),
        sampling=_sampling(tensors),
    )


def wants_stream(tensors: Tensors) -> bool:
    return bool(_scalar(tensors, "stream", False))


def _max_tokens(tensors: Tensors) -> int:
    value: int = _scalar(tensors, "max_tokens", 0)
    if value < 1:
        raise UserError(f"max_tokens is {value}, expected 1 or more")
    return value


def _sampling(tensors: Tensors) -> SamplingParams:
    """run.py's meaning, and TensorRT-LLM's of zero: top_p 0 is off, both filters 0 is greedy."""
    given = {
        name: _scalar(tensors, name, None)
        for name in ("temperature", "top_k", "top_p", "seed")
        if name in tensors
    }
    if given.get("top_k") == 0 and given.get("top_p") == 0.0:
        return SamplingParams()
    if given.get("top_p") == 0.0:
        given["top_p"] = 1.0
    return with_sampling(SamplingParams(), given)


def _images(tensors: Tensors) -> tuple[ImageSource, ...]:
    given = [name for name in _IMAGE_READERS if name in tensors and tensors[name].size]
    if len(given) > 1:
        raise UserError(f"images come as {' and '.join(given)}; give one of them")
    return _IMAGE_READERS[given[0]](tensors) if given else ()


def _pixels(tensors: Tensors) -> tuple[ImageSource, ...]:
    """[1, n, H, W, 3] uint8; image_sizes_input [1, n, 2] tells (height, width) before padding."""
    images = tensors["image_bytes_input"][0]
    sizes = tensors.get("image_sizes_input")
    if sizes is None or not sizes.size:
        return tuple(np.array(image) for image in images)
    if sizes.shape[1] != len(images):
        raise UserError(f"image_sizes_input has {sizes.shape[1]} rows for {len(images)} images")
    return tuple(
        np.array(image[: max(0, height), : max(0, width)])
        for image, (height, width) in zip(images, sizes[0].tolist(), strict=True)
    )


def _tiles(tensors: Tensors) -> tuple[ImageSource, ...]:
    """[1, num_tiles, 3, S, S] float16, normalised: the tiles of one image, the thumbnail last."""
    tiles = tensors["image_input"][0]
    if tiles.ndim != 4 or tiles.shape[1] != 3:
        raise UserError(
            f"image_input is {list(tensors['image_input'].shape)}, expected the normalised tiles "
            "of one image, [1, num_tiles, 3, size, size]; other pictures go into image_bytes_input"
        )
    try:
        pixels = denormalize(tiles)
    except ValueError as error:
        raise UserError(
            f"image_input is not normalised by ImageNet's mean and deviation: {error}"
        ) from None
    return (TiledImage((max(1, len(tiles) - 1), 1), pixels),)


def _base64(tensors: Tensors) -> tuple[ImageSource, ...]:
    return tuple(_decode_base64(data, "image_base64") for data in _strings(tensors, "image_base64"))


def _urls(tensors: Tensors) -> tuple[ImageSource, ...]:
    for url in _strings(tensors, "image_url_input"):
        if not url.startswith(b"data:"):
            raise UserError(
                "image_url_input may only hold data: URLs, because this server fetches nothing; "
                "send the picture itself in image_bytes"
            )
    urls = _strings(tensors, "image_url_input")
    return tuple(_decode_base64(url, "image_url_input") for url in urls)


def _files(tensors: Tensors) -> tuple[ImageSource, ...]:
    return tuple(_strings(tensors, "image_bytes"))


_IMAGE_READERS = {
    "image_bytes": _files,
    "image_base64": _base64,
    "image_bytes_input": _pixels,
    "image_input": _tiles,
    "image_url_input": _urls,
}


def _decode_base64(data: bytes, name: str) -> bytes:
    """Base64, alone or as a data: URL (RFC 2397); line breaks are allowed."""
    if data.startswith(b"data:"):
        header, _, data = data.partition(b",")
        if not header.endswith(b";base64"):
            raise UserError(f"{name} holds a data: URL that is not base64")
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"{name} is not base64: {error}") from None


def _refuse_unsupported(tensors: Tensors) -> None:
    for name, neutral in _NEUTRAL.items():
        values = tensors[name].reshape(-1).tolist() if name in tensors else []
        if any(value not in neutral for value in values):
            raise UserError(f"{name} is not supported by this server; leave it out")


def _scalar(tensors: Tensors, name: str, default: Any) -> Any:
    if name not in tensors:
        return default
    values = tensors[name].reshape(-1).tolist()
    if len(values) != 1:
        raise UserError(f"{name} has {len(values)} values, expected 1")
    return values[0]


def _strings(tensors: Tensors, name: str) -> list[bytes]:
    return tensors[name].reshape(-1).tolist() if name in tensors else []


def _text(tensors: Tensors, name: str, default: str) -> str:
    value = _scalar(tensors, name, None)
    return default if value is None else _decode(value, name)


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
