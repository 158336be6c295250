"""What a benchmark is once it is read: samples in order, and what could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.types import ImageSource

SampleId = int | str


@dataclass(frozen=True, slots=True)
class Sample:
    """`content` is the user's turn, images in line; `fields` go into the output line as they are:
    the ground truth and what the scorer needs beside the answer. `video`: the images are its."""

    id: SampleId
    content: tuple[str | ImageSource, ...]
    fields: dict[str, Any]
    video: Path | None = None

    @property
    def images(self) -> list[ImageSource]:
        return [part for part in self.content if not isinstance(part, str)]

    @property
    def num_image_bytes(self) -> int | None:
        """Of the files the images come from; None where one is missing, or they lie in parquet."""
        files = [self.video] if self.video else self.images
        try:
            return sum(file.stat().st_size for file in files if isinstance(file, Path)) or None
        except OSError:
            return None

    @property
    def text(self) -> str:
        """The user's words without the images."""
        return "".join(part for part in self.content if isinstance(part, str)).strip()


@dataclass(frozen=True, slots=True)
class DataSet:
    """`problems` names, one sentence each, the records that are no samples."""

    samples: list[Sample]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a benchmark lies: --input_image_path, --gt_path, --split, --num_frames."""

    image_dir: Path
    gt_paths: tuple[Path, ...] = ()
    split: str | None = None
    num_frames: int = 8
