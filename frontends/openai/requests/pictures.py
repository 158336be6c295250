"""The pictures of a message: data: URLs, and addresses that media.py has fetched.

What a client sends is decoded in the preparing threads, never on the thread that talks HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frontends.openai.errors import FieldError
from nvlm.inputs.images import make_of_pages
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.picture_source import decode_base64
from nvlm.inputs.tiling import TiledImage, Tiler
from nvlm.model.config import TilingConfig
from nvlm.program.errors import UserError, shown
from runtime.requests.messages import ImageSource
from runtime.serving.picture_types import require_server_type

Detail = Literal["low", "high", "auto"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a message, before it is read."""

    url: str  # data:, or http(s), which must be fetched
    detail: Detail  # OpenAI's; low is one tile
    param: str  # where it stands, as errors say it

    @property
    def is_inline(self) -> bool:
        return self.url[:5].lower() == "data:"

    def source(
        self, file: bytes | None, tiling: TilingConfig, max_num_tiles: int, budget: PictureBudget
    ) -> ImageSource:
        """What the runtime reads the picture from: `file`, which was fetched, or the URL's own.
        budget: of the memory that all pictures take which are read at once."""
        most = 1 if self.detail == "low" else min(max_num_tiles, tiling.max_num_tiles)
        return _Reading(self, file, Tiler(tiling.image_size, max(1, most)), budget)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Called in a preparing thread."""

    picture: Picture  # what to read
    file: bytes | None  # its bytes, if they were fetched; None: the URL holds them
    tiler: Tiler  # the engine's
    budget: PictureBudget  # memory that pictures share

    def __call__(self) -> TiledImage:
        try:
            data = self._bytes()
            require_server_type(data, "the picture")
            return next(make_of_pages(self.tiler, data, "the picture", budget=self.budget))
        except UserError as error:
            raise FieldError(self.picture.param, str(error)) from None

    def _bytes(self) -> bytes:
        if self.file is not None:
            return self.file
        return decode_base64(self.picture.url.encode(errors="surrogatepass"), "the picture")


def read_picture(url: object, detail: object, param: str) -> Picture:
    """A picture by its URL. Raises `FieldError` for what is neither data: nor http(s)."""
    if detail is None:
        detail = "auto"
    if detail not in ("low", "high", "auto"):
        raise FieldError(
            f"{param}.detail", f"detail is {shown(detail)}, expected low, high or auto"
        )
    if not isinstance(url, str) or not url:
        raise FieldError(
            param, 'a picture has no URL, expected {"url": "data:image/png;base64,..."}'
        )
    if not url[:8].lower().startswith(("data:", "http://", "https://")):
        raise FieldError(
            param,
            "a picture is no data: URL and no http(s) address, and this server reads no files; "
            "send data:image/png;base64,...",
        )
    return Picture(url, detail, param)
