"""A Megatron-Core checkpoint as a source of published tensors, without Megatron.

Every rank's file is opened, and every name and shape checked, before the first tensor is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from build.sources.megatron.folder import iteration_dir, rank_files
from build.sources.megatron.merge import Merge, Shards, positions, replicated
from build.sources.megatron.model_config import Stages, model_config
from build.sources.megatron.one_checkpoint import check_no_copies, check_one_checkpoint
from build.sources.megatron.rank_file import RankFile
from build.sources.megatron.tensors import MegatronTensor, megatron_tensors
from build.sources.provenance import file_entries, tokenizer_digests
from nvlm.inputs.tokenizer import PUBLISHED_FILES, TOKENIZER_FILE, Tokenizer
from nvlm.program.errors import UserError

log = logging.getLogger(__name__)


class MegatronSource:
    """Peak memory of a read: the tensor, put together from the pages of the ranks' files.

    Raises `UserError` for ranks that are missing, damaged or not of one NVLM-D checkpoint.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        tokenizer_dir: Path | None = None,
        projector_norm_eps: float | None = None,
    ) -> None:
        self.tokenizer_dir = tokenizer_dir or model_dir
        self._model_dir = model_dir
        files = rank_files(iteration_dir(model_dir))
        num_tokens = _num_tokens(self.tokenizer_dir)
        stages = [[RankFile.read(path) for path in stage] for stage in files]
        check_one_checkpoint(stages)
        config = model_config(stages, num_tokens)
        self.config = config.published
        if projector_norm_eps is not None:
            self.config = self.config.with_projector_norm_eps(projector_norm_eps)
        self._files = [path for stage in files for path in stage]
        self._iteration = stages[0][0].iteration
        self._ranks = {"tp_size": len(stages[0]), "pp_size": len(stages)}
        self._parts: dict[str, tuple[Merge, Shards]] = {}
        known = set()
        for tensor in megatron_tensors(config.stored, len(stages[0]), config.layers_per_stage):
            shards = _shards(stages, tensor)
            known.add(tensor.name)
            self._parts |= {name: (how, shards) for name, how in tensor.holds.items()}
        check_no_copies(stages)
        _warn_of_others(stages, known)

    def read(self, name: str) -> torch.Tensor:
        how, shards = self._parts[name]
        is_whole = how in (replicated, positions)
        if is_whole and not all(torch.equal(shards[0], other) for other in shards[1:]):
            log.warning("%s differs between tensor-parallel ranks; the first rank's is taken", name)
        return how(shards, self.config)

    def provenance(self) -> dict[str, Any]:
        return {
            "layout": "megatron",
            "iteration": self._iteration,
            **self._ranks,
            "projector_norm_eps": self.config.vision.projector_norm_eps,
            "tokenizer_sha256": tokenizer_digests(self.tokenizer_dir),
            "files": file_entries(self._files, self._model_dir),
        }


def _num_tokens(tokenizer_dir: Path) -> int:
    if not (tokenizer_dir / TOKENIZER_FILE).is_file():
        raise UserError(
            f"{tokenizer_dir} has no {TOKENIZER_FILE}, and a Megatron checkpoint carries no "
            f"tokenizer; run: hf download nvidia/NVLM-D-72B {' '.join(PUBLISHED_FILES)} "
            "--local-dir DIR, and give that folder as --tokenizer_dir DIR"
        )
    return Tokenizer(tokenizer_dir).num_tokens


def _shards(stages: Stages, tensor: MegatronTensor) -> Shards:
    """The tensor on each tensor-parallel rank of its stage."""
    stage = _stage_of(stages, tensor)
    shards = []
    for file in stage:
        shard = file.tensors.get(tensor.name)
        if shard is None:
            raise UserError(
                f"{file.path} has no tensor {tensor.name}, expected the whole NVLM-D model in "
                f"{len(stages)} pipeline stages; copy all ranks of one checkpoint"
            )
        if tuple(shard.shape) != tensor.shape or shard.dtype != stage[0].tensors[tensor.name].dtype:
            raise UserError(
                f"{file.path}: {tensor.name} is {shard.dtype} of shape {list(shard.shape)}, but "
                f"args and the other tensors ask for {list(tensor.shape)} on each of "
                f"{len(stage)} ranks, of one type; use files of one checkpoint"
            )
        shards.append(shard)
    return shards


def _stage_of(stages: Stages, tensor: MegatronTensor) -> list[RankFile]:
    if tensor.stage is not None:
        return stages[tensor.stage]
    expected = stages[0] if tensor.name.startswith("vision_") else stages[-1]
    having = (stage for stage in stages if tensor.name in stage[0].tensors)
    return next(having, expected)


def _warn_of_others(stages: Stages, known: set[str]) -> None:
    others = sorted({name for name in _names(stages) if name not in known})
    if others:
        log.warning("%d tensors are not NVLM-D's and are ignored: %s", len(others), others[:3])


def _names(stages: Stages) -> Iterator[str]:
    for stage in stages:
        for file in stage:
            yield from file.tensors
