"""Benchmarks read pictures as the reference does, people's are laid on white and turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.asking.generate import sample_request
from evaluation.datasets.sample import Sample
from evaluation.tasks import TASKS
from nvlm.inputs.tiling import tile_image
from nvlm.inputs.tokenizer import Tokenizer
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from runtime.serving.prepare import prepare
from runtime.serving.ticket import Ticket


def test_a_benchmark_drops_alpha_and_ignores_exif_and_people_have_both(
    engine_dir: Path, tmp_path: Path
) -> None:
    engine, tokenizer = EngineDir.read(engine_dir), Tokenizer(engine_dir / "tokenizer")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture.png"
    see_through = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    see_through.paste((255, 0, 0, 255), (0, 0, 50, 50))
    see_through.save(path, exif=exif)

    def seen(request: GenerationRequest) -> np.ndarray:
        ticket = Ticket(request)
        prepare(engine, tokenizer, ticket)
        return ticket.images[0].tiles

    def expected(image: Image.Image, max_num_tiles: int | None = None) -> np.ndarray:
        most = max_num_tiles or engine.tiling.max_num_tiles
        return tile_image(image, engine.tiling.image_size, most).tiles

    asked = GenerationRequest.images_first("hi", (path,))
    sample = Sample(1, asked.content, {})
    for task in TASKS.values():
        tiles = seen(sample_request(task, sample, GenerationRequest(())))
        published = expected(Image.open(path).convert("RGB"), task.max_num_tiles)
        assert np.array_equal(tiles, published), task.name
    on_white = Image.new("RGB", (200, 100), "white")
    on_white.paste((255, 0, 0), (0, 0, 50, 50))
    upright = on_white.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(seen(asked), expected(upright))
