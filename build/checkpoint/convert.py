"""Step 1 on one page: model directory -> TensorRT-LLM checkpoint directory."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from build.checkpoint import calibration_set
from build.checkpoint.decoder_step import convert_decoder
from build.checkpoint.report import write_report
from build.checkpoint.vision_step import convert_vision
from build.sources.source import WeightSource
from nvlm.checkpoint_config import CheckpointConfig, QuantAlgo
from nvlm.errors import UserError
from nvlm.inputs.tokenizer import FILE_NAME, Tokenizer
from nvlm.json_files import write_json_atomically
from nvlm.manifest import is_current, sha256_of, write_manifest
from nvlm.output_dir import staged_directory
from nvlm.plan import checkpoint_bytes

_TOKENIZER_FILES = (FILE_NAME, "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the command line chooses."""

    quant_algo: QuantAlgo | None = "FP8"
    kv_cache_quant_algo: QuantAlgo | None = "FP8"
    dtype: str = "bfloat16"
    calib_data: Path = calibration_set.BUILT_IN
    calib_size: int = 16

    @property
    def is_calibrated(self) -> bool:
        return self.quant_algo is not None or self.kv_cache_quant_algo is not None

    def to_json(self) -> dict[str, Any]:
        """For the manifest: the calibration file by its contents."""
        values = asdict(self)
        if not self.is_calibrated:
            return {**values, "calib_data": None, "calib_size": 0}
        return {**values, "calib_data": sha256_of(self.calib_data)}


def checkpoint_config(source: WeightSource, options: ConvertOptions) -> CheckpointConfig:
    return CheckpointConfig(
        source.config.decoder, options.dtype, options.quant_algo, options.kv_cache_quant_algo
    )


def convert(
    source: WeightSource,
    output_dir: Path,
    options: ConvertOptions,
    device: torch.device,
    *,
    overwrite: bool = False,
) -> None:
    """Converts and, for FP8, calibrates. `output_dir` appears whole or not at all."""
    config = checkpoint_config(source, options)
    needed_bytes = checkpoint_bytes(config, source.config.vision)
    with (
        torch.inference_mode(),
        staged_directory(
            output_dir,
            "--output_dir",
            "checkpoint",
            overwrite=overwrite,
            needed_bytes=needed_bytes,
        ) as staging,
    ):
        _copy_tokenizer(source, staging / "tokenizer")
        samples = _load_samples(source, options)
        tiles = [sample.tiles for sample in samples]
        vision = convert_vision(
            source, staging / "vision", options.dtype, _concatenate(tiles, source), device
        )
        write_json_atomically(staging / "config.json", config.to_json())
        decoder = convert_decoder(
            source, staging / "rank0.safetensors", config, samples, vision.image_embeddings, device
        )
        if samples:
            write_report(
                staging / "quantization_report.json",
                len(samples),
                vision.report + decoder.linears,
                decoder.attentions,
            )
        write_manifest(
            staging,
            "checkpoint",
            arguments=options.to_json(),
            limits={},
            source=source.provenance(),
        )


def is_up_to_date(source: WeightSource, output_dir: Path, options: ConvertOptions) -> bool:
    """Whether `convert` would only repeat what `output_dir` already holds."""
    if options.is_calibrated and not options.calib_data.is_file():
        return False  # converting says what is wrong
    return is_current(
        output_dir, "checkpoint", arguments=options.to_json(), source=source.provenance()
    )


def _load_samples(
    source: WeightSource, options: ConvertOptions
) -> list[calibration_set.CalibrationSample]:
    if not options.is_calibrated:
        return []
    return calibration_set.load_calibration_set(
        options.calib_data, options.calib_size, source.config, Tokenizer(source.tokenizer_dir)
    )


def _concatenate(tiles: list[torch.Tensor], source: WeightSource) -> torch.Tensor:
    size = source.config.vision.image_size
    return torch.cat([torch.empty(0, 3, size, size), *tiles])


def _copy_tokenizer(source: WeightSource, tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(source.tokenizer_dir)
    vocab_size = source.config.decoder.vocab_size
    if tokenizer.num_tokens > vocab_size:
        raise UserError(
            f"{source.tokenizer_dir / FILE_NAME} has {tokenizer.num_tokens} tokens but the model "
            f"has {vocab_size} embeddings; expected the tokenizer that belongs to the checkpoint"
        )
    tokenizer_dir.mkdir()
    for name in _TOKENIZER_FILES:
        if (source.tokenizer_dir / name).is_file():
            shutil.copyfile(source.tokenizer_dir / name, tokenizer_dir / name)
