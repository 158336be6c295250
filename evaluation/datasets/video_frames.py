"""Evenly spaced frames of a video. Where its packets say where a frame is, the decoder jumps to the
key frame before it; else, or where the frames are not those that the packets promise, it decodes
all of them. Both give the same pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.packages import require_package
from nvlm.inputs.damage import as_its_own_error
from nvlm.inputs.picture_budget import check_num_bytes

Pixels = NDArray[np.uint8]

_ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg4", "mpeg2video", "vp9", "av1", "mjpeg")
"""Codecs whose packets are a frame to show each; VP8 has packets of hidden frames."""


@lru_cache(maxsize=16)  # more than are prepared at once, or every frame would decode its video
def decode_frames(path: Path, num_frames: int) -> tuple[Pixels, ...]:
    """Frames spaced as numpy's linspace, RGB [height, width, 3] each; the last few videos' are kept
    for their next question. Raises `UserError` for a video that cannot be read.
    """
    where = f"video {path}"
    with as_its_own_error(where, "cannot be read", "give a whole video file"):
        return _frames(path, where, num_frames)
    raise AssertionError("what is raised in the block is raised by it")


def _frames(path: Path, where: str, num_frames: int) -> tuple[Pixels, ...]:
    packets = _packets(path)
    check_num_bytes(num_frames * packets.frame_bytes, where)
    wanted = _spaced(packets.number, num_frames)
    pixels = _seek(path, packets, wanted)
    if pixels is None:
        pixels, num_decoded = _pick(path, wanted)
        if num_decoded != packets.number:  # some are never shown, or cannot be decoded
            wanted = _spaced(num_decoded, num_frames)
            pixels, _ = _pick(path, wanted)
    return tuple(pixels[index] for index in wanted)


@dataclass(frozen=True, slots=True)
class Packets:
    """What a video's packets say of its frames, before any is decoded."""

    number: int  # of packets, which is nearly always that of the frames
    # Of the frames in the order of showing; empty: the packets do not say.
    times: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()  # times of the key frames
    frame_bytes: int = 0  # bytes of a frame as RGB


def _spaced(number: int, num_frames: int) -> list[int]:
    return [int(index) for index in np.linspace(0, number - 1, num_frames)]


def _packets(path: Path) -> Packets:
    """Counted without decoding one."""
    av = require_package("av", "av (PyAV)", "VideoMME")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        codec = context.codec.canonical_name
        frame_bytes = 3 * context.width * context.height
        found = [
            (packet.pts, packet.is_keyframe, packet.is_corrupt or packet.is_discard)
            for packet in container.demux(video=0)
            if packet.size > 0
        ]
    times = {time for time, _, _ in found}
    is_plain = None not in times and len(times) == len(found)
    if codec not in _ONE_FRAME_A_PACKET or not is_plain or any(is_odd for _, _, is_odd in found):
        return Packets(len(found), frame_bytes=frame_bytes)
    keys = tuple(time for time, is_key, _ in found if is_key)
    return Packets(len(found), tuple(sorted(times)), keys, frame_bytes)


def _seek(path: Path, packets: Packets, wanted: list[int]) -> dict[int, Pixels] | None:
    """The pixels of these frames, or None where the decoder's frames are not the packets', or there
    are none after a jump."""
    try:
        return _jump(path, packets, wanted)
    except (OSError, ValueError):  # decoding it reports what is wrong with the video
        return None


def _jump(path: Path, packets: Packets, wanted: list[int]) -> dict[int, Pixels] | None:
    times, keys = packets.times, packets.keys
    if not keys or keys[0] != times[0]:
        return None
    av = require_package("av", "av (PyAV)", "VideoMME")
    places = {time: index for index, time in enumerate(times)}
    pixels: dict[int, Pixels] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = _decoded(container)
        expected = 0  # the next frame
        for index in sorted(set(wanted)):
            key = max(time for time in keys if time <= times[index])
            start = None
            if places[key] > expected:
                container.seek(key, stream=stream, backward=True)
                frames = _decoded(container)
                expected, start = places[key], key
            for frame in frames:
                if start is not None and frame.pts is not None and frame.pts < start:
                    continue  # of an earlier key frame, or shown before this one and in need of it
                start = None
                if places.get(frame.pts) != expected:
                    return None
                expected += 1
                if expected > index:
                    pixels[index] = _upright(frame)
                    break
            if index not in pixels:
                return None
    return pixels


def _pick(path: Path, wanted: list[int]) -> tuple[dict[int, Pixels], int]:
    """The pixels of these frames, as far as there are such, and the number of all."""
    pixels, num_decoded = {}, 0
    for index, frame in enumerate(_decode(path)):
        num_decoded += 1
        if index in wanted:
            pixels[index] = _upright(frame)
    if not num_decoded:
        raise ValueError("it has no frames")
    return pixels, num_decoded


def _upright(frame: Any) -> Pixels:
    """Turned as the video's display matrix says: players do it, and ffmpeg for its pictures."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90)  # counterclockwise, as numpy turns
    return np.ascontiguousarray(np.rot90(pixels, quarters))


def _decode(path: Path) -> Iterator[Any]:
    av = require_package("av", "av (PyAV)", "VideoMME")
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        yield from _decoded(container)


def _decoded(container: Any) -> Iterator[Any]:
    yield from container.decode(video=0)
