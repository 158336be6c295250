"""Training batches: scenes with their tokenised prompts, answers and shuffled tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from nvlm.inputs.prompt import DEFAULT_SYSTEM, PromptFormat, build_prompt, images_first
from nvlm.inputs.tiling import Grid, candidate_grids
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from tools.tiny.scene import SceneBatch, SceneSampler

MAX_ANSWER = 16
_ROOM = 72
"""Tokens after the last image: the longest question, the assistant's header and an answer."""
MEGATRON_SYSTEM = "Follow the user's instruction and answer questions."
_FORMATS: tuple[tuple[PromptFormat, str], ...] = (
    ("hf", DEFAULT_SYSTEM),
    ("megatron", DEFAULT_SYSTEM),
    ("megatron", MEGATRON_SYSTEM),
)
_SHUFFLED_SHARE = 0.3
_TEXT_SHARE = 0.04
_ONE_TILE_SHARE = 0.2
_PAGE_SHARE = 0.15
_PROBES = 6


@dataclass(slots=True)
class TrainingBatch:
    """scenes is None for text-only questions; a batch without token_ids has pages.

    token_ids [B, T]; answer_rows [B, A] whose hidden state predicts `targets` [B, A], -100 after
    the end; tile_order [B, tiles]: which tile stands at each place of the prompt; first_rows:
    position of each place's first image token.
    """

    scenes: SceneBatch | None
    tasks: list[str]
    token_ids: NDArray[np.int64] | None = None
    answer_rows: NDArray[np.int64] | None = None
    targets: NDArray[np.int64] | None = None
    tile_order: NDArray[np.int64] | None = None
    first_rows: tuple[int, ...] = ()
    probe_rows: NDArray[np.int64] | None = None
    probe_tiles: NDArray[np.int64] | None = None


class PromptEncoder:
    """Tokenises as the runtime does: same template, same tokenizer."""

    def __init__(self, tokenizer_dir: Path, tokens_per_tile: int, vocab_size: int) -> None:
        self.tokenizer = Tokenizer(tokenizer_dir)
        self.tokens_per_tile = tokens_per_tile
        self.vocab_size = vocab_size
        self.end = self.tokenizer.special_id(IM_END)
        self.digits = [self.tokenizer.encode(str(k))[0] for k in range(10)]
        self.prompt = lru_cache(maxsize=20_000)(self._prompt)

    def _prompt(
        self, num_tiles: int, question: str, prompt_format: PromptFormat, system: str
    ) -> tuple[int, ...]:
        prompt = build_prompt(
            images_first([num_tiles] if num_tiles else [], question),
            self.tokenizer,
            tokens_per_tile=self.tokens_per_tile,
            vocab_size=self.vocab_size,
            system=system,
            prompt_format=prompt_format,
        )
        return tuple(prompt.token_ids)

    def encode(
        self,
        batch: TrainingBatch,
        questions: list[str],
        answers: list[str],
        num_tiles: int,
        style: tuple[PromptFormat, str],
    ) -> None:
        """Fills in the token arrays of the batch."""
        prompts = [self.prompt(num_tiles, question, *style) for question in questions]
        rows = np.array([i for i, t in enumerate(prompts[0]) if t >= self.vocab_size], np.int64)
        batch.first_rows = tuple(rows[:: self.tokens_per_tile].tolist())
        length = (rows[-1] + 1 if num_tiles else 40) + _ROOM
        length += -length % 8
        token_ids = np.full((len(prompts), length), self.end, np.int64)
        batch.answer_rows = np.zeros((len(prompts), MAX_ANSWER), np.int64)
        batch.targets = np.full((len(prompts), MAX_ANSWER), -100, np.int64)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            target = [*self.tokenizer.encode(answer), self.end]
            token_ids[i, : len(prompt)] = prompt
            token_ids[i, len(prompt) : len(prompt) + len(target) - 1] = target[:-1]
            batch.answer_rows[i, : len(target)] = len(prompt) - 1 + np.arange(len(target))
            batch.targets[i, : len(target)] = target
        batch.token_ids = token_ids

    def add_probes(self, batch: TrainingBatch, random: np.random.Generator) -> None:
        """Digits after the answers, where no answer sees them, for a dense loss."""
        assert batch.scenes is not None
        assert batch.token_ids is not None
        assert batch.answer_rows is not None
        num_tiles = batch.scenes.grid[0] * batch.scenes.grid[1]
        shown = batch.scenes.tile_lines.characters[:, 0].reshape(-1, num_tiles)
        batch.probe_tiles = random.integers(num_tiles, size=(len(shown), _PROBES))
        batch.probe_rows = np.zeros_like(batch.probe_tiles)
        digits = np.array(self.digits)
        for nth, tiles in enumerate(batch.probe_tiles):
            index = batch.scenes.num_text + nth
            token_ids = batch.token_ids[index]
            end = int(batch.answer_rows[index].max()) + 2
            batch.probe_rows[nth] = end + np.arange(_PROBES)
            token_ids[batch.probe_rows[nth]] = digits[shown[nth, tiles]]
            if batch.tasks[index] == "which_tile":
                question = token_ids[: batch.answer_rows[index, 0]]
                tiles[0] = int(batch.scenes.answer[index].split()[1]) - 1
                batch.probe_rows[nth, 0] = np.flatnonzero(question == digits[shown[nth, tiles[0]]])[
                    -1
                ]

    def shuffle_tiles(self, batch: TrainingBatch, random: np.random.Generator) -> None:
        """Puts tiles with their tags into another order, so that only the tag shows the place."""
        assert batch.token_ids is not None
        assert batch.tile_order is not None
        num_grid_tiles = batch.tile_order.shape[1] - 1
        order = np.argsort(random.random((len(batch.tile_order), num_grid_tiles)), 1)
        batch.tile_order[:, :num_grid_tiles] = order
        digits = np.array(self.digits)
        for place in range(num_grid_tiles):
            batch.token_ids[:, batch.first_rows[place] - 2] = digits[order[:, place] + 1]


class TrainingData(IterableDataset[TrainingBatch]):
    """Endless batches of about `num_tiles_per_batch` tiles; each worker draws its own."""

    def __init__(
        self,
        sampler_arguments: dict[str, Any],
        encoder_arguments: tuple[Path, int, int],
        num_tiles_per_batch: int,
        seed: int,
        max_length: Synchronized[int],
        pages_only: Synchronized[int],
    ) -> None:
        super().__init__()
        self.sampler_arguments = sampler_arguments
        self.encoder_arguments = encoder_arguments
        self.num_tiles_per_batch = num_tiles_per_batch
        self.seed = seed
        self.max_length = max_length
        self.pages_only = pages_only

    def __iter__(self) -> Iterator[TrainingBatch]:
        worker = get_worker_info()
        random = np.random.default_rng((self.seed, worker.id if worker else 0))
        sampler = SceneSampler(**self.sampler_arguments, generator=random)
        encoder = PromptEncoder(*self.encoder_arguments)
        while True:
            sampler.max_length = self.max_length.value
            if self.pages_only.value or random.random() < _PAGE_SHARE:
                sampler.max_length = 8
                num_lines = int(random.integers(2, 7))
                yield TrainingBatch(sampler.pages(self.num_tiles_per_batch, num_lines), [])
                continue
            yield make_batch(sampler, encoder, self.num_tiles_per_batch, random)


def make_batch(
    sampler: SceneSampler,
    encoder: PromptEncoder,
    num_tiles_per_batch: int,
    random: np.random.Generator,
    grid: Grid | None = None,
) -> TrainingBatch:
    """A batch of scenes on `grid` (or a random one), or of text-only questions."""
    style = _FORMATS[0] if random.random() < 0.5 else _FORMATS[int(random.integers(1, 3))]
    if grid is None and random.random() < _TEXT_SHARE:
        asked = [sampler.text_only() for _ in range(512)]
        batch = TrainingBatch(None, [task for task, _, _ in asked])
        encoder.encode(batch, [q for _, q, _ in asked], [a for _, _, a in asked], 0, style)
        return batch
    if grid is None:
        grids = candidate_grids(6)
        one_tile = random.random() < _ONE_TILE_SHARE
        grid = grids[0] if one_tile else grids[int(random.integers(1, len(grids)))]
    num_tiles = grid[0] * grid[1] + (grid != (1, 1))
    scenes = sampler.scenes(grid, num_tiles_per_batch // num_tiles)
    batch = TrainingBatch(scenes, scenes.task)
    encoder.encode(batch, scenes.question, scenes.answer, num_tiles, style)
    if num_tiles > 1:
        encoder.add_probes(batch, random)
    batch.tile_order = np.tile(np.arange(num_tiles), (len(scenes.task), 1))
    if num_tiles > 1 and random.random() < _SHUFFLED_SHARE:
        encoder.shuffle_tiles(batch, random)
    return batch
