"""Trains the small NVLM-D from scratch on one GPU, by the clock.

    python -m tools.tiny.train --fonts_dir D --output_dir D --minutes 24 [--seed N] [--init_from D]

First pages of text teach the vision encoder letters (a dense loss: each patch names the character
at its centre), then scenes with questions train the whole model, with the dense losses still on.
The output directory gets the model every few minutes and log.jsonl, a line every 100 steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from multiprocessing import Value
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from nvlm.inputs.tiling import IMAGENET_MEAN, IMAGENET_STD
from nvlm.program.errors import UserError
from tools.tiny.atlas import draw_atlas
from tools.tiny.compositor import IGNORE, NUM_LABELS, Compositor, Picture, draw
from tools.tiny.fonts import training_font_files, validation_font_files
from tools.tiny.model import (
    NO_INDEX,
    NUM_COLOURS,
    NUM_TILE_LABELS,
    TINY,
    TOKEN_LABELS,
    TinyNVLM,
    export,
    load_exported,
)
from tools.tiny.prompts import PromptEncoder, TrainingBatch, TrainingData, make_batch
from tools.tiny.scene import SceneSampler
from tools.tiny.tokenizer import write_tokenizer

PAGES_UNTIL = 0.12  # of the time: pages only
CURRICULUM = ((0.17, 3), (0.22, 5))  # (until this share of the time, characters at most), then 8
WARM_UP_STEPS = 200
LEARNING_RATE = 1e-3
WHICH_TILE_WEIGHT = 4.0
"""The weight of its tokens in the answers' loss: one of the six says something."""
PATCHES_PER_SIDE = TINY.image_size // TINY.patch_size
VALIDATION_GRIDS = ((1, 1), (2, 1), (1, 3), (2, 2), (3, 2), (5, 1))


class Trainer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(arguments.seed)
        torch.set_float32_matmul_precision("high")
        training = training_font_files(arguments.fonts_dir)
        validation = validation_font_files(arguments.fonts_dir)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write_tokenizer(arguments.output_dir)
        self.atlas = draw_atlas(training + validation)
        self.num_training_fonts = len(training)
        self.compositor = Compositor(self.atlas, TINY.image_size, self.device)
        self.model = TinyNVLM().to(self.device)
        if arguments.init_from:
            load_exported(self.model, arguments.init_from)
        self.vit: Any = self.model.vision.vision_model
        if self.device.type == "cuda":
            self.vit = torch.compile(self.vit)
            self.compositor.line_alpha = torch.compile(  # type: ignore[method-assign]
                self.compositor.line_alpha, dynamic=True
            )
        heads = [p for name, p in self.model.named_parameters() if "_labels." in name]
        trunk = [p for name, p in self.model.named_parameters() if "_labels." not in name]
        decayed = [p for p in trunk if p.ndim >= 2]
        others = [p for p in trunk if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": heads, "weight_decay": 0.0},
                {"params": decayed, "weight_decay": 0.05},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, device=self.device).view(3, 1, 1)
        self.generator = torch.Generator(self.device).manual_seed(arguments.seed)
        self.max_length, self.pages_only = Value("i", 8), Value("i", 1)
        self.log = (arguments.output_dir / "log.jsonl").open("w")

    def sampler_arguments(self, fonts: range) -> dict[str, Any]:
        return {
            "advances": self.atlas.advances,
            "has_lower_case": self.atlas.has_lower_case,
            "fonts": np.array(fonts),
            "tile_size": TINY.image_size,
        }

    def encoder_arguments(self) -> tuple[Path, int, int]:
        config = self.model.config
        return self.arguments.output_dir, config.vision.tokens_per_tile, config.decoder.vocab_size

    def run(self) -> None:
        arguments = self.arguments
        data = TrainingData(
            self.sampler_arguments(range(self.num_training_fonts)),
            self.encoder_arguments(),
            arguments.num_tiles,
            arguments.seed,
            self.max_length,
            self.pages_only,
        )
        loader = iter(
            DataLoader(
                data,
                batch_size=None,
                num_workers=arguments.num_workers,
                prefetch_factor=3 if arguments.num_workers else None,
            )
        )
        started, total_s = time.monotonic(), 60 * arguments.minutes
        step, num_samples, next_save = 0, 0, 0.05
        sums: dict[str, list[Tensor]] = defaultdict(list)
        while (progress := (time.monotonic() - started) / total_s) < 1:
            self._schedule(step, progress)
            batch = next(loader)
            losses = self.losses(batch)
            self.optimizer.zero_grad(set_to_none=True)
            sum(losses.values(), torch.zeros((), device=self.device)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            step += 1
            num_samples += len(batch.tasks)
            for name, loss in losses.items():
                sums[name].append(loss.detach())
            if step % 100 == 0:
                values = {k: round(float(torch.stack(v).mean()), 4) for k, v in sums.items()}
                sums.clear()
                line = {"step": step, "samples": num_samples, "progress": round(progress, 4)}
                line |= {"seconds": round(time.monotonic() - started, 1), **values}
                if step % 1000 == 0 and not self.pages_only.value:
                    line["validation"] = self.validate()
                self._write(line)
            if progress > next_save:
                export(self.model, arguments.output_dir)
                next_save += 0.05
        self._write({"step": step, "samples": num_samples, "validation": self.validate(6)})
        export(self.model, arguments.output_dir)

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def _schedule(self, step: int, progress: float) -> None:
        """Warm-up, then a straight line down to zero at the end.

        Taken-over weights wait for the new heads of the dense losses, which would mislead them.
        """
        fresh = not self.arguments.init_from
        self.pages_only.value = int(fresh and progress < PAGES_UNTIL)
        self.max_length.value = next(
            (length for until, length in CURRICULUM if fresh and progress < until), 8
        )
        rate = self.arguments.learning_rate * min(1.0, (1 - progress) / 0.85)
        heads, *trunk = self.optimizer.param_groups
        heads["lr"] = max(rate * min(1.0, (step + 1) / WARM_UP_STEPS), 1e-6)
        step -= 0 if fresh else WARM_UP_STEPS
        for group in trunk:
            group["lr"] = max(rate * min(1.0, (step + 1) / WARM_UP_STEPS), 0.0)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            if batch.scenes is None:
                return {"answer": self._answer_loss(batch, None, None)}
            picture, hidden = self._see(batch, self.vit)
            content, colour = self.model.patch_labels(hidden[:, 1:]).split(
                (NUM_LABELS, NUM_COLOURS), -1
            )
            losses = {
                "patch": _dense_loss(content, picture.patches.content),
                "patch_colour": 0.2 * _where_known(colour, picture.patches.colour),
            }
            if batch.token_ids is not None:
                embeddings = self.model.vision.project(hidden).unflatten(0, picture.tiles.shape[:2])
                losses["answer"] = self._answer_loss(batch, embeddings, (picture, losses))
            return losses

    def _see(self, batch: TrainingBatch, vit: Any) -> tuple[Picture, Tensor]:
        assert batch.scenes is not None
        num_lines = len(batch.scenes.lines.font) // len(batch.scenes.background)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            picture = draw(
                self.compositor, batch.scenes, num_lines, PATCHES_PER_SIDE, self.generator
            )
            tiles = ((picture.tiles.flatten(0, 1) - self.mean) / self.std).to(torch.bfloat16)
        return picture, vit(tiles)

    def _answer_loss(
        self,
        batch: TrainingBatch,
        embeddings: Tensor | None,
        dense: tuple[Picture, dict[str, Tensor]] | None,
    ) -> Tensor:
        logits, labelled, probed, order = self._logits(batch, embeddings)
        assert batch.targets is not None
        if dense is not None:
            picture, losses = dense
            losses |= self._token_losses(picture, labelled, order)
            if batch.probe_rows is not None:
                losses["probe"] = 0.2 * self._probe_loss(batch, probed)
        targets = torch.from_numpy(batch.targets).to(self.device)
        each = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        weights = torch.tensor(
            [WHICH_TILE_WEIGHT if task == "which_tile" else 1.0 for task in batch.tasks],
            device=self.device,
        )
        weights = (weights[:, None] * (targets != IGNORE)).flatten()
        return (each * weights).sum() / weights.sum()

    def _logits(
        self, batch: TrainingBatch, embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert batch.token_ids is not None
        assert batch.answer_rows is not None
        token_ids = torch.from_numpy(batch.token_ids).to(self.device)
        order = torch.zeros(0)
        if embeddings is not None:
            assert batch.tile_order is not None
            order = torch.from_numpy(batch.tile_order).to(self.device)
            embeddings = _in_order(embeddings, order)
        hidden, labelled, probed = self.model.decode(token_ids, embeddings, list(batch.first_rows))
        rows = torch.from_numpy(batch.answer_rows).to(self.device)[:, :, None]
        answers = hidden.gather(1, rows.expand(-1, -1, hidden.shape[2]))
        return self.model.decoder.lm_head(answers), labelled, probed, order

    def _probe_loss(self, batch: TrainingBatch, probed: Tensor) -> Tensor:
        """Each probe, a digit that one tile shows, names this tile."""
        assert batch.scenes is not None
        assert batch.probe_rows is not None
        assert batch.probe_tiles is not None
        rows = torch.from_numpy(batch.probe_rows).to(self.device)
        first = batch.scenes.num_text
        probed = probed[first : first + len(rows)]
        states = probed.gather(1, rows[:, :, None].expand(-1, -1, probed.shape[2]))
        tiles = torch.from_numpy(batch.probe_tiles).to(self.device)
        return cross_entropy(self.model.probe_labels(states).flatten(0, 1).float(), tiles.flatten())

    def _token_losses(self, picture: Picture, labelled: Tensor, order: Tensor) -> dict[str, Tensor]:
        """Each image token names its character, its index in the line, its tile and its colour."""
        parts = self.model.token_labels(labelled).split(TOKEN_LABELS, -1)
        content = _in_order(picture.tokens.content, order)
        shape = content.shape
        predicted_content, predicted_index, predicted_tile, predicted_colour = (
            part.unflatten(1, shape[1:]) for part in parts
        )
        index = _in_order(picture.tokens.index, order)
        index = index.masked_fill(index < 0, NO_INDEX).masked_fill(content == IGNORE, IGNORE)
        num_tiles = order.shape[1]
        tile = order.masked_fill(order == num_tiles - 1, NUM_TILE_LABELS - 1)
        tile = tile[:, :, None].expand(shape)
        colour = _in_order(picture.tokens.colour, order)
        return {
            "token": 0.5 * _dense_loss(predicted_content, content),
            "index": 0.5 * _dense_loss(predicted_index, index, NO_INDEX),
            "tile": 0.1 * _where_known(predicted_tile, tile),
            "token_colour": 0.2 * _where_known(predicted_colour, colour),
        }

    @torch.no_grad()
    def validate(self, repeats: int = 1) -> dict[str, float]:
        """Share of wholly right answers per task on fonts unseen in training."""
        random = np.random.default_rng(self.arguments.seed + 1)
        fonts = range(self.num_training_fonts, len(self.atlas.advances))
        sampler = SceneSampler(**self.sampler_arguments(fonts), generator=random)
        encoder = PromptEncoder(*self.encoder_arguments())
        right: dict[str, list[bool]] = defaultdict(list)
        for grid in VALIDATION_GRIDS * repeats:
            batch = make_batch(sampler, encoder, self.arguments.num_tiles, random, grid)
            assert batch.targets is not None
            with torch.autocast(self.device.type, torch.bfloat16):
                # Not the compiled encoder, which would be compiled again without gradients.
                picture, hidden = self._see(batch, self.model.vision.vision_model)
                embeddings = self.model.vision.project(hidden).unflatten(0, picture.tiles.shape[:2])
                logits, _, _, _ = self._logits(batch, embeddings)
            targets = torch.from_numpy(batch.targets).to(self.device)
            hits = ((logits.argmax(-1) == targets) | (targets == -100)).all(1).tolist()
            for task, hit in zip(batch.tasks, hits, strict=True):
                right[task].append(hit)
        return {task: round(sum(hits) / len(hits), 4) for task, hits in sorted(right.items())}


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """values [B, tiles, ...] rearranged so that place i holds tile order[:, i]."""
    rows = torch.arange(len(order), device=values.device)[:, None]
    return values[rows, order]


def _where_known(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over labels that are not IGNORE; 0 when there are none."""
    total = cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


def _dense_loss(logits: Tensor, labels: Tensor, nothing: int = 0) -> Tensor:
    """Cross entropy in which the many empty places weigh as much as the others together."""
    labels = labels.flatten()
    losses = cross_entropy(
        logits.flatten(0, -2).float(), labels, reduction="none", ignore_index=IGNORE
    )
    is_empty, is_used = labels == nothing, labels != IGNORE
    is_full = is_used & ~is_empty
    full = (losses * is_full).sum() / is_full.sum().clamp(min=1)
    empty = (losses * is_empty).sum() / is_empty.sum().clamp(min=1)
    return full + 0.3 * empty


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fonts_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--init_from", type=Path, help="start from these weights")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--num_tiles", type=int, default=840, help="tiles a step")
    parser.add_argument("--num_workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        trainer = Trainer(arguments)
    except UserError as error:
        parser.error(str(error))
    trainer.run()


if __name__ == "__main__":
    main()
