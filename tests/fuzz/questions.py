"""What clients send: request lines, JSON beside Triton's tensors, and the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from frontends.triton.parameters import refuse_unknown
from frontends.triton.request import read_request, wants_stream
from frontends.triton.signature import NVLM_INPUTS
from nvlm.inputs.images import make_of_pages
from nvlm.inputs.tiling import TiledImage, Tiler
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from runtime.requests.request_file import read_requests
from runtime.requests.types import GenerationRequest
from tests.fuzz.kind import Opened
from tests.fuzz.mutations import EXTREMES, Draw, json_text, mutated_json

_TILER = Tiler(56, 6)
_LIMITS = EngineLimits(
    max_batch_size=2,
    max_input_len=2048,
    max_seq_len=2304,
    max_num_tokens=2048,
    max_num_images=3,
    max_multimodal_len=1024,
)
_LINES: list[Any] = [
    {
        "id": 3,
        "prompt": "Read it.",
        "images": ["a.png", "data:image/png;base64,AAAA"],
        "max_new_tokens": 8,
        "stop": ["\n"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 7,
        "page": 1,
        "system": "s",
        "max_num_tiles": 2,
        "prompt_format": "hf",
    },
    {
        "prompt": [
            {"type": "text", "text": "a"},
            {"type": "image", "image": "b.png"},
            {"type": "image_url", "image_url": {"url": "file:///c.png"}},
        ]
    },
]
_BODIES = [{"text_input": "a", "max_tokens": 3, "id": "7", "triton_x": 1, "image": "AAAA"}, {}]
_TYPES = {
    "TYPE_STRING": object,
    "TYPE_BOOL": np.bool_,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT64": np.uint64,
}


def open_request_lines(folder: Path) -> Opened:
    path = folder / "lines.jsonl"
    defaults = GenerationRequest(("",))

    def read(lines: list[bytes]) -> None:
        path.write_bytes(b"\n".join(lines))
        found = read_requests(path, defaults)
        for line in found:
            json.dumps(line.id, allow_nan=False)
            if isinstance(line.request, GenerationRequest):
                assert line.request.content
                assert line.request.max_new_tokens == int(line.request.max_new_tokens)
            else:
                assert len(str(line.request)) < 1500
        if found and all(isinstance(line.request, UserError) for line in found):
            raise UserError("every line is refused")

    return Opened(st.lists(json_text(_LINES), min_size=1, max_size=3), read)


def open_bodies(_: Path) -> Opened:
    """What Triton makes of a JSON body: parameters of all that is no input."""

    def read(body: Any) -> None:
        if isinstance(body, dict):  # Triton itself refuses the rest
            refuse_unknown(json.dumps(body))

    return Opened(mutated_json(_BODIES), read)


def open_tensors(_: Path) -> Opened:
    def read(tensors: dict[str, Any]) -> None:
        wants_stream(tensors)
        request = read_request(tensors, _LIMITS)
        assert request.max_new_tokens >= 1
        for part in request.content:
            if not isinstance(part, str | TiledImage):
                source: Any = part
                next(make_of_pages(_TILER, source, "the image"))

    return Opened(_tensors(), read)


@st.composite
def _tensors(draw: Draw) -> dict[str, Any]:
    """Tensors of the types and numbers of dimensions that Triton lets through."""
    chosen = draw(st.lists(st.sampled_from(NVLM_INPUTS), max_size=4, unique=True))
    required = [spec for spec in NVLM_INPUTS if not spec.optional]
    found = {}
    for spec in {spec.name: spec for spec in (*required, *chosen)}.values():
        sides = st.sampled_from((0, 1, 1, 2, 3, 56))
        shape = [1, *(draw(sides) if side == -1 else side for side in spec.dims)]
        found[spec.name] = draw(_array(_TYPES[spec.data_type], shape, 6))
    return found


@st.composite
def _array(draw: Draw, dtype: Any, shape: list[int], num_drawn: int) -> Any:
    number = int(np.prod(shape))
    if dtype is object:
        texts = st.one_of(
            st.binary(max_size=40),
            st.sampled_from((b"hi", b"", b"\xff", b"data:image/png;base64,AAAA", b"AAAA", b"-1")),
        )
        values = [draw(texts) for _ in range(min(number, num_drawn))] or [b""]
        flat = np.array([values[k % len(values)] for k in range(number)] + [None], object)[:-1]
        return flat.reshape(shape)
    if np.issubdtype(dtype, np.floating):
        one = st.sampled_from((0.0, 1.0, -1.0, 0.5, 2.0, float("nan"), float("inf"), 6e4, 1e-8))
    else:
        one = st.one_of(st.sampled_from(EXTREMES), st.sampled_from((-1, -2, 3, 8)))
    drawn = [draw(one) for _ in range(min(number, num_drawn))] or [0]
    with np.errstate(all="ignore"):
        return np.resize(np.array(drawn).astype(dtype), number).reshape(shape)
