"""What a file is by its first bytes, where Pillow alone cannot read it."""

from __future__ import annotations

import codecs

HEAD_BYTES = 1024

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_PICTURE_BRANDS = {b"avif", b"avis", b"mif1", b"msf1"}

# First bytes, and what helps; of files that people take for pictures.
_NO_PICTURES = (
    ((b"<!doctype html", b"<html"), "it is a web page; download the picture itself"),
    ((b"<svg", b"<?xml"), "it is a drawing in SVG or other XML; export it as PNG"),
    ((b"\x1a\x45\xdf\xa3",), "it is a video; give frames of it"),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "it is JPEG XL; save it as JPEG or PNG"),
    ((b"pk\x03\x04",), "it is an archive or an Office document; export its pages as PDF or PNG"),
    ((b"\x1f\x8b",), "it is packed by gzip; unpack it"),
    ((b"version https://git-lfs",), "it is a pointer of Git LFS; run git lfs pull"),
)
_OTHERWISE = "expected a JPEG, PNG or other picture file"


def is_pdf(head: bytes) -> bool:
    return head.lstrip().startswith(b"%PDF-")


def is_heic(head: bytes) -> bool:
    """HEIF whose pictures are HEVC; AVIF has the same container."""
    return bool(_brands(head) & _HEIC_BRANDS)


def remedy(head: bytes) -> str:
    """What helps somebody whose file is no picture: the end of a message."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for beginnings, advice in _NO_PICTURES:
        if start.startswith(tuple(beginning.lower() for beginning in beginnings)):
            return advice
    is_avi = (head[:4], head[8:12]) == (b"RIFF", b"AVI ")
    if is_avi or (_brands(head) and not _brands(head) & _PICTURE_BRANDS):
        return "it is a video; give frames of it"
    return _OTHERWISE


def _brands(head: bytes) -> set[bytes]:
    """What an ISO base media file says it is (ISO/IEC 14496-12, 4.3), in four letters each."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[start : start + 4] for start in range(16, end - 3, 4))}
