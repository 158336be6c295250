"""The small model's tools: tokenizer, drawing, labels, export and evaluation, without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_names import model_tensors
from nvlm.inputs.prompt import tile_tags
from nvlm.inputs.tiling import candidate_grids, tile_image
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.model.vision import VisionModel
from nvlm.program.errors import UserError
from tests.support.ablations import TAG_LENGTH
from tools.tiny import evaluation, questions
from tools.tiny.atlas import CHARACTERS, Atlas, draw_atlas
from tools.tiny.compositor import Compositor, draw
from tools.tiny.fonts import evaluation_font_files, training_font_files
from tools.tiny.model import TinyNVLM, export, load_exported
from tools.tiny.prompts import PromptEncoder, make_batch
from tools.tiny.scene import SceneBatch, SceneSampler
from tools.tiny.tokenizer import write_tokenizer
from tools.tiny.words import held_out_words, training_words

TILE_SIZE, PATCHES = 224, 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert write_tokenizer(folder) <= 512
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    """Any fonts do; these are at hand."""
    return draw_atlas(evaluation_font_files()[:3])


def scenes(atlas: Atlas, grid: tuple[int, int], number: int, seed: int = 0) -> SceneBatch:
    sampler = SceneSampler(
        atlas.advances,
        atlas.has_lower_case,
        np.arange(len(atlas.advances)),
        TILE_SIZE,
        np.random.default_rng(seed),
    )
    return sampler.scenes(grid, number)


def test_tile_tags_have_one_length_and_reading_goes_by_letters(tokenizer: Tokenizer) -> None:
    assert {len(tokenizer.encode(tag)) for tag in tile_tags(7)} == {TAG_LENGTH}
    for text in ("tile", "thread", "Image", "407"):
        assert len(tokenizer.encode(text)) == len(text)
    for group in questions.WORDINGS:
        for wording in group:
            assert tokenizer.decode(tokenizer.encode(wording)) == wording


def test_held_out_words_are_no_training_words() -> None:
    training, held_out = set(training_words()), set(held_out_words())
    assert not training & held_out
    assert 0.05 < len(held_out) / len(training) < 0.2
    assert all(3 <= len(word) <= 8 and word.islower() for word in training | held_out)


def test_evaluation_fonts_are_no_training_fonts() -> None:
    families = json.loads((Path(evaluation.__file__).parent / "fonts.json").read_text())
    used = {path.name.partition("-latin-")[0] for path in evaluation_font_files()}
    assert used == set(families["evaluation"])
    assert not used & (set(families["training"]) | set(families["validation"]))


def test_training_refuses_a_folder_without_fonts(tmp_path: Path) -> None:
    (tmp_path / "roboto-latin-400-normal.woff2").touch()
    with pytest.raises(UserError, match="is missing 124 of the 125 training families, open-sans"):
        training_font_files(tmp_path)


def test_labels_lie_on_the_ink(atlas: Atlas) -> None:
    """Most of a picture's departure from its background is where a character is labelled."""
    batch = scenes(atlas, (2, 1), 12)
    batch.blur = 1.0
    batch.background[:] = 0.5
    batch.lines.colour[:] = 0.0
    compositor = Compositor(atlas, TILE_SIZE, torch.device("cpu"))
    picture = draw(compositor, batch, 2, PATCHES, torch.Generator().manual_seed(0))
    assert picture.tiles.shape == (12, 3, 3, TILE_SIZE, TILE_SIZE)
    ink = (picture.tiles[: batch.num_text, :2].mean(2) < 0.2).float()
    patches = torch.nn.functional.avg_pool2d(ink, TILE_SIZE // PATCHES).flatten(2)
    is_labelled = picture.patches.content[: batch.num_text, :2] > 0
    assert patches[is_labelled].mean() > 0.1
    # Glyphs reach a little beyond the patches whose centres they cover.
    assert patches[~is_labelled].sum() < 0.35 * patches.sum()


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 5)])
@pytest.mark.long
def test_labels_spell_the_answer(atlas: Atlas, grid: tuple[int, int]) -> None:
    """Characters by their index in the line give the text that is asked for."""
    batch = scenes(atlas, grid, 20, seed=1)
    compositor = Compositor(atlas, TILE_SIZE, torch.device("cpu"))
    picture = draw(compositor, batch, 2, 64, torch.Generator().manual_seed(0))
    num_tiles = grid[0] * grid[1]
    for i in range(batch.num_two_lines, batch.num_text):
        if batch.task[i] not in ("number", "word"):
            continue
        content = picture.patches.content[i, :num_tiles].flatten()
        index = picture.patches.index[i, :num_tiles].flatten()
        spelled = {
            int(k): CHARACTERS[int(c) - 1] for k, c in zip(index, content, strict=True) if c > 0
        }
        assert "".join(spelled[k] for k in sorted(spelled)) == batch.answer[i]


def test_a_tile_scene_has_its_digit_in_the_tile_it_names(atlas: Atlas) -> None:
    batch = scenes(atlas, (3, 2), 18, seed=2)
    compositor = Compositor(atlas, TILE_SIZE, torch.device("cpu"))
    picture = draw(compositor, batch, 2, PATCHES, torch.Generator().manual_seed(0))
    seen = set()
    for i, task in enumerate(batch.task):
        if task not in ("which_tile", "tile_shows"):
            continue
        seen.add(task)
        digits = []
        for tile in range(6):
            content = picture.patches.content[i, tile]
            (label,) = set(content[content > 0].tolist())
            digits.append(CHARACTERS[label - 1])
        question, answer = batch.question[i], batch.answer[i]
        number = next(c for c in question if c.isdigit())
        if task == "which_tile":
            assert digits[int(answer.removeprefix("tile ")) - 1] == number
        else:
            assert digits[int(number) - 1] == answer
    assert seen == {"which_tile", "tile_shows"}


def test_probes_are_digits_of_the_tiles_they_name(
    atlas: Atlas, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first of a which-tile question is the question's own; the others no answer sees."""
    folder = tmp_path_factory.mktemp("probes")
    write_tokenizer(folder)
    encoder = PromptEncoder(folder, 64, 512)
    fonts = np.arange(len(atlas.advances))
    random = np.random.default_rng(0)
    sampler = SceneSampler(atlas.advances, atlas.has_lower_case, fonts, TILE_SIZE, random)
    batch = make_batch(sampler, encoder, 400, random, (3, 2))
    assert batch.scenes is not None
    assert batch.token_ids is not None
    assert batch.answer_rows is not None
    assert batch.probe_rows is not None
    assert batch.probe_tiles is not None
    shown = batch.scenes.tile_lines.characters[:, 0].reshape(-1, 6)
    for nth, (rows, tiles) in enumerate(zip(batch.probe_rows, batch.probe_tiles, strict=True)):
        index = batch.scenes.num_text + nth
        tokens = batch.token_ids[index, rows].tolist()
        assert [encoder.tokenizer.decode([t]) for t in tokens] == [
            CHARACTERS[shown[nth, tile]] for tile in tiles
        ]
        is_question = rows < batch.answer_rows[index, 0]
        assert is_question[0] == (batch.tasks[index] == "which_tile")
        assert not is_question[1:].any()
        assert (rows[1:] > batch.answer_rows[index].max() + 1).all()
    assert len(set(batch.tasks) & {"which_tile", "tile_shows"}) == 2


def test_export_has_the_published_names_types_and_zero_dummy_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNVLM()
    export(model, tmp_path)
    source = {t.name: t for t in model_tensors(model.config)}
    readers = [SafetensorsReader(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    stored = {name: reader.read(name) for reader in readers for name in reader.tensors}
    assert {name: (t.shape, t.dtype) for name, t in source.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in stored.items()
    }
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 26e6
    # With its dummy heads the exported encoder computes what the trained one did.
    exported = VisionModel(model.config.vision)
    exported.load_state_dict(
        {name: stored[name].float() for name in exported.state_dict()}, strict=True
    )
    tiles = torch.randn(1, 3, TILE_SIZE, TILE_SIZE)
    with torch.inference_mode():
        load_exported(model, tmp_path)  # rounded as stored
        torch.testing.assert_close(exported(tiles), model.vision(tiles), rtol=1e-4, atol=1e-4)


def test_evaluation_pictures_take_every_grid_and_repeat_exactly() -> None:
    grids = set()
    for sample in evaluation.samples("number", 40):
        assert sample.image is not None
        grids.add(tile_image(sample.image, TILE_SIZE, 6).grid)
    assert len(grids) >= 10
    assert grids <= set(candidate_grids(6))
    for task in evaluation.TASKS:
        first, again = (list(evaluation.samples(task, 3)) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            assert (a.id, a.question, a.answer) == (b.id, b.question, b.answer)
            assert a.image == b.image


def test_scores_count_exact_answers(tmp_path: Path) -> None:
    answers = []
    for i, sample in enumerate(evaluation.samples("number", 4)):
        text = sample.answer if i else sample.answer + " "
        answers.append({"id": sample.id, "text": text})
    answers.append({"id": "text-0", "error": "no"})
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert evaluation.score(path) == {"number": 0.75, "text": 0.0}
    assert evaluation.score(path, lambda sample: sample.id == "number-0") == {"number": 0.0}


@pytest.mark.parametrize("text", ["", '{"id": "word"}', '{"id": "poem-1"}', '{"id": 3}', "[]"])
def test_what_is_no_answer_of_the_evaluation_is_refused_with_its_line(
    tmp_path: Path, text: str
) -> None:
    """The demo's own answers, for one."""
    path = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match="cannot be read"):
        evaluation.score(path)
    path.write_text(f'{{"id": "word-0", "text": ""}}\n{text}\n')
    with pytest.raises(UserError, match="line 2 answers none"):
        evaluation.score(path)
