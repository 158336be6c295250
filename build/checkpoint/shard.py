"""From a published tensor to the part of it that a rank holds."""

from __future__ import annotations

import torch

from nvlm.config import DecoderConfig
from nvlm.mapping import Mapping
from nvlm.tensor_names import KEY_VALUE_SOURCES, EngineTensor


def shard(
    tensor: EngineTensor,
    source: str,
    part: torch.Tensor,
    decoder: DecoderConfig,
    mapping: Mapping,
) -> torch.Tensor:
    """The rank's rows or columns of `part`, which is the whole `source` of `tensor`: a view.

    Rows of the head are padded with zeros where the vocabulary does not divide; only then is
    something copied.
    """
    if tensor.split is None:
        return part
    dim = 0 if tensor.split == "column" else 1
    if tensor.name == "lm_head.weight":
        part = _padded(part, mapping.padded_vocab_size(len(part)))
    num_heads = decoder.num_key_value_heads if source.startswith(KEY_VALUE_SOURCES) else None
    held = mapping.shard(part.shape[dim], num_heads)
    return part.narrow(dim, held.start, len(held))


def _padded(part: torch.Tensor, num_rows: int) -> torch.Tensor:
    if num_rows == len(part):
        return part
    return torch.cat([part, part.new_zeros(num_rows - len(part), *part.shape[1:])])
