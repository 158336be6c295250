"""Short videos in several containers and codecs, damaged."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from evaluation.datasets.video_frames import decode_frames
from tests.fuzz.kind import Opened
from tests.fuzz.mutations import mutated_bytes

_FORMS = (("a.mp4", "mpeg4"), ("b.avi", "mjpeg"), ("c.mkv", "libx264"), ("d.webm", "libvpx-vp9"))
_FORMS += (("e.mpg", "mpeg2video"),)


def open_videos(folder: Path) -> Opened:
    seeds = []
    for name, codec in _FORMS:
        path = folder / name
        try:
            _write(path, codec)
        except (ValueError, OSError):  # PyAV was built without it
            continue
        seeds.append(path.read_bytes())
    av.logging.set_level(None)
    place = folder / "case.mkv"  # containers are recognised by their content

    def read(data: bytes) -> None:
        place.write_bytes(data)
        decode_frames.cache_clear()
        frames = decode_frames(place, 3)
        assert len(frames) == 3
        assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in frames)

    return Opened(mutated_bytes(seeds), read)


def _write(path: Path, codec: str) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.gop_size = 48, 32, 4
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(8):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 2 * k, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
