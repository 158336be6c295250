"""What names a picture on the command line or in a request line: a path or a URL.

Nothing is fetched: a picture comes from this machine or stands in the URL itself.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from nvlm.program.errors import UserError, cut

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{512,}={0,2}")  # no path is so long without a dot
_PIECE_CHARACTERS = 1 << 18


def picture_source(name: str, folder: Path = Path()) -> Path | bytes:
    """A file's path, relative to `folder`, or the bytes in a data: URL.

    Raises `UserError` for a URL that would have to be fetched.
    """
    if name[:5].lower() == "data:":
        return decode_base64(name.encode(), "an image")
    if name[:6].lower() == "file:/":
        return _local_path(name)
    if scheme := _SCHEME.match(name):
        raise UserError(
            f"image {cut(name)} is an address, and nothing is fetched from "
            f"{scheme[1]}: here; download it (curl -LO URL) and give the file"
        )
    if _BASE64.fullmatch(name):
        raise UserError(
            f"image {name} is base64, expected a file's name or a URL; write "
            "data:image/png;base64, before it"
        )
    return folder / name


def decode_base64(data: bytes, name: str) -> bytes:
    """Base64, alone or as a data: URL (RFC 2397), whose bytes may be percent-encoded; line breaks
    are allowed.

    `name` is what messages call it, which never repeat the data.
    """
    if data[:5].lower() == b"data:":
        header, comma, data = data.partition(b",")
        if not comma or not b"".join(header.split()).lower().endswith(b";base64"):
            raise UserError(
                f"{name} holds a data: URL that is not base64, expected "
                "data:image/png;base64,... or the like"
            )
        data = unquote_to_bytes(data)
    try:
        return _decoded(data)
    except binascii.Error as error:
        raise UserError(
            f"{name} is not base64 ({error}), expected letters, digits, + and /, filled up with =; "
            "encode the whole file again"
        ) from None


def _decoded(data: bytes) -> bytes:
    """In pieces, between which other threads get Python's lock: of 64 MB a whole would keep it for
    a tenth of a second. Raises `binascii.Error` as the whole does."""
    decoded = io.BytesIO()
    rest, is_padded = b"", False
    try:
        for start in range(0, len(data), _PIECE_CHARACTERS):
            rest += b"".join(data[start : start + _PIECE_CHARACTERS].split())
            end = len(rest) - len(rest) % 4
            if end and is_padded:
                raise binascii.Error("data after the padding")
            is_padded = rest[:end].endswith(b"=")
            decoded.write(base64.b64decode(rest[:end], validate=True))
            rest = rest[end:]
        if rest:
            raise binascii.Error("too few characters")
    except binascii.Error:
        return base64.b64decode(b"".join(data.split()), validate=True)
    return decoded.getvalue()


def _local_path(url: str) -> Path:
    """The path of a file: URL (RFC 8089) of this machine."""
    parts = urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise UserError(
            f"image {cut(url)} is on another machine, expected file:///path; copy it here"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"image {cut(url)} has a ? or #, expected file:///path with them written as %3F and %23"
        )
    path = unquote_to_bytes(parts.path)
    return Path(path.decode("utf-8", errors="surrogateescape"))
