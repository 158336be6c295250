"""POST /v1/tiles: the pictures of messages as the model sees them, each tile under its tag.

The messages go the way of a question, up to the vision encoder: these are its pixels.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from frontends.openai.call import Call
from frontends.openai.requests.fields import settings_of, text_field
from frontends.openai.requests.messages import read_messages
from nvlm.inputs.prompt import tile_tags
from nvlm.inputs.tiling import TiledImage


async def tiles(call: Call) -> dict[str, Any]:
    door, body = call.door, call.body
    door.require_model(text_field(body, "model"))
    settings = settings_of(body, "tiles")
    request = await door.request_of(read_messages(body), settings)
    return {
        "pictures": await door.prepared(request, lambda ticket: [*map(_shown, ticket.images)]),
        "tokens_per_tile": door.runner.engine.vision_config.tokens_per_tile,
    }


def _shown(image: TiledImage) -> dict[str, Any]:
    pairs = zip(tile_tags(image.num_tiles), image.tiles, strict=True)
    return {
        "grid": list(image.grid),
        "tiles": [{"tag": tag, "url": _png(tile)} for tag, tile in pairs],
    }


def _png(tile: NDArray[np.uint8]) -> str:
    """[S, S, 3] RGB, without loss."""
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
