"""A `DecoderModel` of two random tables, for tests of what comes after the logits: fast, and
different after every token."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from nvlm.planning.limits import EngineLimits
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.scheduler import max_num_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor

VOCAB_SIZE, HIDDEN_SIZE, MAX_SEQ_LEN = 97, 8, 320


class TableModel:
    """The logits after a token are its row and the row of its position, added."""

    def __init__(self, seed: int, scale: float = 2.0, vocab_size: int = VOCAB_SIZE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self._of_token = scale * torch.randn(vocab_size + 64, vocab_size, generator=generator)
        self._of_position = scale * torch.randn(MAX_SEQ_LEN, vocab_size, generator=generator)
        self.computed: list[tuple[int, int]] = []  # (first position, tokens) of each sequence

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        rows = []
        for step in steps:
            self.computed.append((step.first_position, len(step.token_ids)))
            token_ids = torch.tensor(step.token_ids)
            positions = torch.arange(step.first_position, step.end_position)
            logits = self._of_token[token_ids] + self._of_position[positions]
            rows.append(logits[len(logits) - step.num_logits :])
        return torch.cat(rows)

    def close(self) -> None:
        """Nothing is held."""


class TableAheadModel(TableModel):
    """`AheadModel`: a step is launched upon tokens that only the device knows."""

    max_rows_ahead = 64

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        drawn = iter(token_ids.tolist())
        known = [
            replace(step, token_ids=[next(drawn)]) if step.is_unknown else step for step in steps
        ]
        assert next(drawn, None) is None, "a token for each that is unknown"
        return self.forward(known)


def open_table_executor(
    model: TableModel, num_blocks: int | None = None, **limits: int
) -> TorchDecoderExecutor:
    chosen = {
        "max_batch_size": 8,
        "max_input_len": 200,
        "max_seq_len": MAX_SEQ_LEN,
        "max_num_tokens": 8192,
        "max_num_images": 1,
        "max_multimodal_len": 512,
        **limits,
    }
    config: Any = SimpleNamespace(
        decoder=SimpleNamespace(vocab_size=model.vocab_size, hidden_size=HIDDEN_SIZE)
    )
    engine_limits = EngineLimits(**chosen)
    num_blocks = num_blocks or max_num_blocks(engine_limits)
    return TorchDecoderExecutor(config, engine_limits, model, num_blocks)
