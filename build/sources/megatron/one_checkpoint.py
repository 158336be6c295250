"""Whether the ranks' files are those of one checkpoint, each in the folder Megatron gave it."""

from __future__ import annotations

from itertools import combinations, pairwise

import torch

from build.sources.megatron.model_config import MODEL_ARGS, Stages
from build.sources.megatron.rank_file import RankFile
from build.sources.megatron.tensors import MEGATRON_DECODER_LAYER, MEGATRON_VISION_LAYER
from nvlm.program.errors import UserError, shown

# Every rank has other rows of these: no dummy heads, no padding.
_DECODER_MLP, _VISION_MLP = (
    layer.format(i=0) + "mlp.linear_fc1.weight"
    for layer in (MEGATRON_DECODER_LAYER, MEGATRON_VISION_LAYER)
)


def check_one_checkpoint(stages: Stages) -> None:
    """Raises `UserError` for ranks of several iterations or models, and for exchanged folders."""
    first = stages[0][0]
    for file in (file for stage in stages for file in stage):
        if file.iteration != first.iteration:
            raise UserError(
                f"{file.path} is of iteration {file.iteration}, {first.path} of "
                f"{first.iteration}; copy all ranks of one iteration"
            )
        for name in MODEL_ARGS:
            found, expected = (f.args.get(name) for f in (file, first))
            if found != expected:
                raise UserError(
                    f"{file.path}: args.{name} is {shown(found)}, but {shown(expected)} in "
                    f"{first.path}; copy all ranks of one checkpoint"
                )
    for stage in stages:
        _check_order(stage)
    _check_order([stage[0] for stage in stages])


def _check_order(files: list[RankFile]) -> None:
    """args.rank is the number of the process that wrote a file. Megatron numbers tensor-parallel
    ranks first and stages later; converters write all ranks from one process, which shows nothing.
    """
    ranks = [file.args.get("rank") for file in files]
    if not all(isinstance(rank, int) for rank in ranks) or len(set(ranks)) < len(ranks):
        return
    for file, following in pairwise(files):
        if file.args["rank"] > following.args["rank"]:
            raise UserError(
                f"{file.path} was saved by rank {file.args['rank']} and {following.path} by rank "
                f"{following.args['rank']}, expected rising ranks in folders in this order; copy "
                "all ranks under the names Megatron gave them"
            )


def check_no_copies(stages: Stages) -> None:
    """Raises `UserError` where one rank's file lies in two folders. Reads until values differ."""
    for stage in stages:
        _check_no_copies(stage, _DECODER_MLP)
        _check_no_copies(stage, _VISION_MLP)
    _check_no_copies([stage[0] for stage in stages], _DECODER_MLP)


def _check_no_copies(files: list[RankFile], name: str) -> None:
    tensors = [(file, file.tensors[name]) for file in files if name in file.tensors]
    for (file, tensor), (other, same) in combinations(tensors, 2):
        if tensor.dtype == same.dtype and torch.equal(tensor, same):
            raise UserError(
                f"{other.path} holds the same {name} as {file.path}, expected each rank's own "
                "rows; copy all ranks under the names Megatron gave them"
            )
