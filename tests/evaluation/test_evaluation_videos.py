"""Frames of a video by jumps to key frames are those of decoding all of it, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from evaluation.datasets import video_frames
from evaluation.datasets.video_frames import decode_frames
from nvlm.inputs import picture_budget
from nvlm.program.errors import UserError

av = pytest.importorskip("av")

NUM_FRAMES = 90
GOP = 12


def write_video(path: Path, codec: str, options: dict[str, str]) -> None:
    """Moving noise, so that no frame is another's."""
    noise = np.random.default_rng(1).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream(codec, rate=25, options=options)
        except ValueError:  # av.codec.codec.UnknownCodecError
            pytest.skip(f"PyAV was built without {codec}")
        stream.width, stream.height, stream.gop_size = 96, 64, GOP
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 2 * k, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def frames(path: Path, number: int) -> tuple[video_frames.Pixels, ...]:
    decode_frames.cache_clear()
    return decode_frames(path, number)


@pytest.mark.parametrize(
    ("name", "codec", "options", "must_jump"),
    [
        ("plain.mp4", "libx264", {"bf": "3"}, True),
        ("open_gop.mp4", "libx264", {"x264-params": "open-gop=1:bframes=4:b-pyramid=2"}, True),
        ("plain.mkv", "libx264", {}, True),
        ("open_gop.mp4", "libx265", {"x265-params": "log-level=none:keyint=12:open-gop=1"}, True),
        ("plain.mp4", "mpeg4", {}, True),
        ("plain.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, True),
        ("plain.avi", "mjpeg", {}, True),
        # Where packets do not say which frame is theirs, or frames are not there after a jump.
        ("refresh.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}, False),
        ("stream.ts", "libx264", {}, False),
        ("b_frames.avi", "mpeg4", {"bf": "2"}, False),
        ("hidden.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}, False),
        ("program.mpg", "mpeg2video", {"bf": "2"}, False),
    ],
)
def test_frames_found_by_jumps_are_those_of_decoding_all(
    name: str, codec: str, options: dict[str, str], must_jump: bool, tmp_path: Path
) -> None:
    path = tmp_path / name
    write_video(path, codec, options)
    for number in (2, 5, 8):
        with patch.object(video_frames, "_seek", return_value=None):
            expected = frames(path, number)
        with patch.object(video_frames, "_decode", wraps=video_frames._decode) as decode_all:
            found = frames(path, number)
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert np.array_equal(ours, theirs), f"frame {index} of {number}"
        if must_jump:
            assert decode_all.call_count == 0


def test_a_long_video_is_not_decoded_whole(tmp_path: Path) -> None:
    """Three of 90 frames in groups of 12 need only the frames before them in their groups."""
    path = tmp_path / "v.mp4"
    write_video(path, "mpeg4", {})
    num_decoded = 0
    decoded = video_frames._decoded

    def counted(container: Any) -> Iterator[Any]:
        nonlocal num_decoded
        for frame in decoded(container):
            num_decoded += 1
            yield frame

    with patch.object(video_frames, "_decoded", counted):
        frames(path, 3)
    # Frames 0, 44 (the ninth of its group) and 89 (the sixth).
    assert num_decoded == 1 + 9 + 6


def test_an_error_after_a_jump_falls_back(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, "mpeg4", {})
    expected = frames(path, 3)
    with patch.object(video_frames, "_jump", side_effect=OSError("cannot seek")):
        found = frames(path, 3)
    assert all(map(np.array_equal, found, expected))


IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def quarter_turns(number: int) -> bytes:
    """A display matrix (ISO/IEC 14496-12, 8.3.2) that turns clockwise: (x, y) to (-y, x)."""
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][number]
    return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize("is_whole", [False, True], ids=["jumps", "decoded_whole"])
def test_a_video_taken_sideways_is_turned_upright(tmp_path: Path, is_whole: bool) -> None:
    """As a telephone writes it: pixels lie, and the track's matrix turns them."""
    path = tmp_path / "v.mp4"
    write_video(path, "mpeg4", {})
    data = path.read_bytes()
    matrix = data.index(IDENTITY, data.index(b"tkhd"))
    found = {}
    for turns in (0, 1, 2, 3):
        path.write_bytes(data[:matrix] + quarter_turns(turns) + data[matrix + len(IDENTITY) :])
        with patch.object(video_frames, "_seek", wraps=video_frames._seek) as seek:
            if is_whole:
                seek.return_value = None
                seek.side_effect = None
            found[turns] = frames(path, 5)
    for turns, pixels in found.items():
        for ours, upright in zip(pixels, found[0], strict=True):
            # numpy turns counterclockwise.
            assert np.array_equal(ours, np.rot90(upright, -turns)), f"{turns} quarter turns"
    assert found[1][0].shape == (96, 64, 3)


@pytest.mark.parametrize("error", [AttributeError("codec"), EOFError(), MemoryError(), OSError(5)])
def test_whatever_a_video_raises_is_its_own_error(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "video.mp4"
    write_video(path, "mpeg4", {})
    with (
        patch.object(video_frames, "_packets", side_effect=error),
        pytest.raises(UserError, match=rf"^video {path} "),
    ):
        decode_frames(path, 2)


def test_frames_beyond_the_budget_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "video.mp4"
    write_video(path, "mpeg4", {})
    monkeypatch.setattr(picture_budget, "DEFAULT_BYTES", 1000)
    with pytest.raises(UserError, match=rf"^video {path} takes .* MB of memory to read"):
        decode_frames(path, 2)
