"""The types of pictures that a server reads: one list for all doors.

Pillow has readers for some fifty formats, most of them old and hardly ever used. What a stranger
sends goes to those only that people's pictures need.
"""

from __future__ import annotations

from collections.abc import Callable

from nvlm.inputs.signatures import HEAD_BYTES, is_heic, is_pdf, remedy
from nvlm.program.errors import UserError
from runtime.requests.types import GenerationRequest


def _begins(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(signatures)


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def _is_avif(head: bytes) -> bool:
    """ISO/IEC 23000-22: the container of HEIF, with a brand of its own."""
    end = int.from_bytes(head[:4], "big")
    return head[4:8] == b"ftyp" and (b"avif" in head[8:end] or b"avis" in head[8:end])


SERVER_PICTURE_TYPES: dict[str, Callable[[bytes], bool]] = {
    "PNG": _begins(b"\x89PNG\r\n\x1a\n"),
    "JPEG": _begins(b"\xff\xd8\xff"),
    "WebP": _is_webp,
    "GIF": _begins(b"GIF87a", b"GIF89a"),
    "TIFF": _begins(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": _begins(b"BM"),
    "AVIF": _is_avif,
}
"""Whether a file's first bytes are the type's. Names are Pillow's, but for capitals."""


def require_server_types(request: GenerationRequest) -> None:
    """Raises `UserError` for a picture file of another type; paths are the program's own."""
    shown = [part for turn in request.turns for part in turn.content]
    files = [part for part in shown if isinstance(part, bytes)]
    for number, data in enumerate(files, start=1):
        require_server_type(
            data, "the image" if len(files) == 1 else f"image {number} of {len(files)}"
        )


def require_server_type(data: bytes, name: str) -> None:
    """Raises `UserError` for a file of another type. The reader reports an empty one."""
    head = data[:HEAD_BYTES]
    is_read = any(matches(head) for matches in SERVER_PICTURE_TYPES.values())
    if data and (not is_read or is_heic(head) or is_pdf(head)):
        *types, last = SERVER_PICTURE_TYPES
        raise UserError(
            f"{name} is none of {', '.join(types)} and {last}, which alone a server reads; "
            f"{remedy(head)}"
        )
