"""Which part of the decoder a rank holds: tensor parallel within a stage, stages by layers.

The grid is TensorRT-LLM's Mapping with cp_size 1: rank = pp_rank * tp_size + tp_rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvlm.model.config import DecoderConfig, exact_div
from nvlm.program.errors import UserError


@dataclass(frozen=True, slots=True)
class Mapping:
    """One rank of tp_size x pp_size."""

    tp_size: int = 1  # tensor parallel ranks
    pp_size: int = 1  # pipeline parallel ranks
    rank: int = 0  # from 0; ranks of one pipeline stage are neighbours

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm and the head."""
        return self.pp_rank == self.pp_size - 1

    def all_ranks(self) -> list[Mapping]:
        return [replace(self, rank=rank) for rank in range(self.world_size)]

    def layers(self, num_hidden_layers: int) -> range:
        """The model's layers of this stage; layer 0 of the rank's file is the first of them."""
        count = exact_div(num_hidden_layers, self.pp_size)
        return range(self.pp_rank * count, (self.pp_rank + 1) * count)

    def shard(self, size: int, num_heads: int | None = None) -> range:
        """This rank's part of `size` rows or columns: tp_size equal parts in order.

        `num_heads` says how many heads the rows are; where there are fewer heads than ranks, a head
        is on as many neighbouring ranks as it takes (key and value heads).
        """
        num_parts = min(self.tp_size, num_heads or self.tp_size)
        part = self.tp_rank * num_parts // self.tp_size
        width = exact_div(size, num_parts)
        return range(part * width, (part + 1) * width)

    def local_heads(self, num_heads: int) -> int:
        """Heads on a rank, at least one."""
        return exact_div(max(num_heads, self.tp_size), self.tp_size)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the head over all ranks: zero rows make them equal."""
        return -(-vocab_size // self.tp_size) * self.tp_size


def check_divides(decoder: DecoderConfig, tp_size: int, pp_size: int) -> None:
    """Raises `UserError` unless the decoder divides into tp_size x pp_size ranks."""
    heads, key_value_heads = decoder.num_attention_heads, decoder.num_key_value_heads

    def divides(size: int) -> bool:
        return (
            heads % size == 0
            and decoder.intermediate_size % size == 0
            and (key_value_heads % size == 0 or size % key_value_heads == 0)
        )

    if not divides(tp_size):
        sizes = [size for size in range(1, heads + 1) if divides(size)]
        raise UserError(
            f"tp_size {tp_size} does not divide {heads} attention heads, {key_value_heads} key "
            f"and value heads and intermediate_size {decoder.intermediate_size}; use "
            f"{_one_of(sizes)}"
        )
    if decoder.num_hidden_layers % pp_size:
        num_layers = decoder.num_hidden_layers
        sizes = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
        raise UserError(
            f"pp_size {pp_size} does not divide {num_layers} decoder layers; use {_one_of(sizes)}"
        )


def _one_of(sizes: list[int]) -> str:
    names = [str(size) for size in sizes]
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
