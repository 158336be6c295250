"""The pictures of a request, in each of the ways a client may send them.

They come inside the request only: nothing is ever read from the network or a file because a client
named it.
"""

from __future__ import annotations

import numpy as np

from frontends.triton.tensors import Tensors, strings
from nvlm.inputs.picture_source import decode_base64
from nvlm.inputs.tiling import TiledImage, denormalize
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from runtime.requests.messages import ImageSource
from runtime.serving.prepare import check_num_images


def read_images(tensors: Tensors, limits: EngineLimits) -> tuple[ImageSource, ...]:
    given = [name for name in _IMAGE_READERS if name in tensors and tensors[name].shape[1]]
    if len(given) > 1:
        raise UserError(f"images come as {' and '.join(given)}; give one of them")
    if not given:
        return ()
    num_images = 1 if given[0] == "image_input" else tensors[given[0]].shape[1]
    check_num_images(num_images, limits)  # before any is copied
    return _IMAGE_READERS[given[0]](tensors)


def picture_in_url(url: bytes, name: str) -> bytes:
    """The picture's file. `name` is where the URL stands."""
    if url[:5].lower() != b"data:":
        raise UserError(
            f"{name} may only hold data: URLs, because this server fetches nothing; send the "
            "picture itself in image_bytes"
        )
    return decode_base64(url, name)


def _pixels(tensors: Tensors) -> tuple[ImageSource, ...]:
    """[1, n, H, W, 3] uint8; image_sizes_input [1, n, 2] has (height, width) before padding."""
    images = tensors["image_bytes_input"][0]
    sizes = tensors.get("image_sizes_input")
    if sizes is None or not sizes.size:
        return tuple(np.array(image) for image in images)
    if sizes.shape[1] != len(images):
        raise UserError(f"image_sizes_input has {sizes.shape[1]} rows for {len(images)} images")
    if (sizes[0] > images.shape[1:3]).any():
        raise UserError(
            f"image_sizes_input goes up to {sizes[0].max(axis=0).tolist()}, expected at most the "
            f"{list(images.shape[1:3])} of image_bytes_input"
        )
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
    return tuple(decode_base64(data, "image_base64") for data in strings(tensors, "image_base64"))


def _urls(tensors: Tensors) -> tuple[ImageSource, ...]:
    urls = strings(tensors, "image_url_input")
    return tuple(picture_in_url(url, "image_url_input") for url in urls)


def _files(tensors: Tensors) -> tuple[ImageSource, ...]:
    return tuple(strings(tensors, "image_bytes"))


_IMAGE_READERS = {
    "image_bytes": _files,
    "image_base64": _base64,
    "image_bytes_input": _pixels,
    "image_input": _tiles,
    "image_url_input": _urls,
}
