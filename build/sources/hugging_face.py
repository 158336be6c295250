"""The published layout: config.json, sharded safetensors with an index, tokenizer files.

Every file is opened and every name and shape checked before the first tensor is read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from build.sources.model_dir import check_model_dir
from build.sources.provenance import file_entries, tokenizer_digests
from nvlm.formats import layout
from nvlm.formats.manifest import sha256_of
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_names import model_tensors
from nvlm.model.config import NVLMConfig
from nvlm.program.errors import UserError
from nvlm.program.json_files import read_json_object

_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

log = logging.getLogger(__name__)


class HuggingFaceSource:
    """Peak memory of a read: nothing beyond the tensor, whose pages are the file's own.

    Raises `UserError` for a missing or truncated shard, a missing tensor or a wrong shape.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        tokenizer_dir: Path | None = None,
        projector_norm_eps: float | None = None,
    ) -> None:
        check_model_dir(model_dir)
        self.config = model_config(model_dir)
        if projector_norm_eps is not None:
            self.config = self.config.with_projector_norm_eps(projector_norm_eps)
        self.tokenizer_dir = tokenizer_dir or model_dir
        self._model_dir = model_dir
        self._weight_map = _weight_map(model_dir)
        files = sorted(set(self._weight_map.values()))
        for name in files:
            if not _is_file(model_dir / name):
                raise UserError(
                    f"{model_dir / name} is missing, though {layout.WEIGHTS_INDEX} names it; "
                    "download it again"
                )
        self._readers = {name: SafetensorsReader(model_dir / name) for name in files}
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Names and shapes, from the files' headers alone."""
        num_layers = self.config.vision.num_hidden_layers + self.config.decoder.num_hidden_layers
        if num_layers > len(self._weight_map):  # before as many names are made
            raise UserError(
                f"{self._model_dir / layout.CONFIG} asks for {num_layers} layers, but "
                f"{layout.WEIGHTS_INDEX} has only {len(self._weight_map)} tensors; download it "
                "again"
            )
        expected = model_tensors(self.config)
        for tensor in expected:
            file = self._weight_map.get(tensor.name)
            found = self._readers[file].tensors.get(tensor.name) if file else None
            if found is None:
                has_index = (self._model_dir / layout.WEIGHTS_INDEX).is_file()
                holder = file or (layout.WEIGHTS_INDEX if has_index else layout.WEIGHTS)
                raise UserError(
                    f"{self._model_dir / holder} has no tensor {tensor.name}, expected all "
                    f"{len(expected)} of NVLM-D; download it again"
                )
            if found.dtype not in _STORED_DTYPES:
                raise UserError(
                    f"{self._model_dir / str(file)}: {tensor.name} is stored as {found.dtype}, "
                    "expected float32, float16 or bfloat16; give the unquantised checkpoint"
                )
            if found.shape != tensor.shape:
                raise UserError(
                    f"{self._model_dir / str(file)}: {tensor.name} has shape {list(found.shape)}, "
                    f"{layout.CONFIG} asks for {list(tensor.shape)}; use files of one checkpoint"
                )
        ignored = sorted(self._weight_map.keys() - {tensor.name for tensor in expected})
        if ignored:
            log.warning(
                "%d tensors are not NVLM-D's and are ignored: %s", len(ignored), ignored[:3]
            )

    def read(self, name: str) -> torch.Tensor:
        return self._readers[self._weight_map[name]].read(name)

    def provenance(self) -> dict[str, Any]:
        index = self._model_dir / layout.WEIGHTS_INDEX
        return {
            "layout": "hugging_face",
            "config_sha256": sha256_of(self._model_dir / layout.CONFIG),
            "index_sha256": sha256_of(index) if index.is_file() else None,
            "projector_norm_eps": self.config.vision.projector_norm_eps,
            "tokenizer_sha256": tokenizer_digests(self.tokenizer_dir),
            "files": file_entries(
                [self._model_dir / name for name in sorted(self._readers)], self._model_dir
            ),
        }


def model_config(model_dir: Path) -> NVLMConfig:
    """What config.json says of the model; raises `UserError` where there is none."""
    path = model_dir / layout.CONFIG
    if not path.is_file():
        raise UserError(
            f"{model_dir} has no {layout.CONFIG}; expected an NVLM-D checkpoint in Hugging Face "
            f"layout, or Megatron-Core's {layout.MEGATRON_TRACKER} and iter_*; give its folder as "
            "--model_dir"
        )
    return NVLMConfig.from_hf(read_json_object(path), path)


def read_index(model_dir: Path) -> NVLMConfig:
    """The configuration of a model whose weights need not be there: config.json, and the index,
    which must name every tensor."""
    check_model_dir(model_dir)
    config = model_config(model_dir)
    index = model_dir / layout.WEIGHTS_INDEX
    if index.is_file():
        names = _weight_map(model_dir)
        missing = [tensor.name for tensor in model_tensors(config) if tensor.name not in names]
        if missing:
            raise UserError(
                f"{index} has no tensor {missing[0]} ({len(missing)} are missing), which "
                f"{layout.CONFIG} asks for; download it again"
            )
    return config


def _weight_map(model_dir: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index, single = model_dir / layout.WEIGHTS_INDEX, model_dir / layout.WEIGHTS
    if not index.is_file():
        if not single.is_file():
            raise UserError(
                f"{model_dir} has neither {layout.WEIGHTS_INDEX} nor {layout.WEIGHTS}; give the "
                "folder of a whole NVLM-D checkpoint"
            )
        return dict.fromkeys(SafetensorsReader(single).tensors, layout.WEIGHTS)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise UserError(
            f"{index}: expected weight_map to map tensor names to file names beside it; download "
            "it again"
        )
    return weight_map


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False
