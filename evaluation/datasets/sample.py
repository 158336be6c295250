"""What a benchmark is once it is read: samples in order, and what could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.requests.messages import ImageSource

SampleId = int | str


@dataclass(frozen=True, slots=True)
class Sample:
    """One question of a benchmark."""

    id: SampleId  # as the benchmark has it
    content: tuple[str | ImageSource, ...]  # the user's turn, images in line
    # Go into the output line as they are: the truth, and what the scorer needs beside the answer.
    fields: dict[str, Any]
    video: Path | None = None  # the images are its frames; None: they are pictures

    @property
    def images(self) -> list[ImageSource]:
        return [part for part in self.content if not isinstance(part, str)]

    @property
    def files(self) -> list[Path]:
        """That the images come from; none where they lie in parquet."""
        if self.video:
            return [self.video]
        return [image for image in self.images if isinstance(image, Path)]

    @property
    def num_image_bytes(self) -> int | None:
        """The files' bytes together; None where one is missing, or there are none."""
        try:
            return sum(file.stat().st_size for file in self.files) or None
        except OSError:
            return None

    @property
    def text(self) -> str:
        """The user's words without the images."""
        return "".join(part for part in self.content if isinstance(part, str)).strip()


@dataclass(frozen=True, slots=True)
class DataSet:
    """What the ground truth became."""

    # By position in the file: samples, or sentences that say why it is none.
    records: list[list[Sample | str]]
    # A sentence for each part that is missing from the copy of the benchmark: nobody can count its
    # records.
    incomplete: list[str] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [part for record in self.records for part in record if isinstance(part, Sample)]

    @property
    def problems(self) -> list[str]:
        bad = [part for record in self.records for part in record if isinstance(part, str)]
        return self.incomplete + bad

    def part(self, first: int, end: int) -> DataSet:
        """The data set of these records; a bad one keeps its place, so fixing it moves no other."""
        return DataSet(self.records[first:end], self.incomplete)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a benchmark lies: --input_image_path, --gt_path, --split, --num_frames."""

    image_dir: Path  # images, videos or parquet files
    gt_paths: tuple[Path, ...] = ()  # files of the questions
    split: str | None = None  # None: the task's own
    num_frames: int = 8  # of each video
