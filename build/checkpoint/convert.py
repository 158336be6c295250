"""Step 1 on one page: model directory -> TensorRT-LLM checkpoint directory."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from build.checkpoint import calibration_set
from build.checkpoint.calibration_set import CalibrationSample
from build.checkpoint.decoder_step import convert_decoder
from build.checkpoint.report import write_report
from build.checkpoint.vision_step import convert_vision
from build.sources.source import WeightSource
from nvlm.checkpoint_config import CheckpointConfig, QuantAlgo
from nvlm.errors import UserError
from nvlm.inputs.tokenizer import FILE_NAME, Tokenizer, tokenizer_files
from nvlm.json_files import write_json_atomically
from nvlm.manifest import is_current, write_manifest
from nvlm.mapping import check_divides
from nvlm.output_dir import OutputPlace, staged_directory
from nvlm.plan import checkpoint_bytes


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the command line chooses."""

    quant_algo: QuantAlgo | None = "FP8"
    kv_cache_quant_algo: QuantAlgo | None = "FP8"
    dtype: str = "bfloat16"
    calib_data: Path = calibration_set.BUILT_IN
    calib_size: int = 16
    tp_size: int = 1
    pp_size: int = 1

    @property
    def is_calibrated(self) -> bool:
        return self.quant_algo is not None or self.kv_cache_quant_algo is not None

    def config(self, source: WeightSource) -> CheckpointConfig:
        """Raises `UserError` where the decoder does not divide into the ranks asked for."""
        decoder = source.config.decoder
        try:
            check_divides(decoder, self.tp_size, self.pp_size)
        except UserError as error:
            raise UserError(f"--{error}") from None
        return CheckpointConfig(
            decoder,
            self.dtype,
            self.quant_algo,
            self.kv_cache_quant_algo,
            self.tp_size,
            self.pp_size,
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
    config = options.config(source)
    samples = _load_samples(source, options)
    made_from = _made_from(source, options, samples)  # before the first byte is read
    place = OutputPlace(output_dir, "--output_dir", "checkpoint", overwrite)
    needed_bytes = checkpoint_bytes(config, source.config.vision)
    with torch.inference_mode(), staged_directory(place, needed_bytes) as staging:
        _copy_tokenizer(source, staging / "tokenizer")
        write_json_atomically(staging / "config.json", config.to_json())
        tiles = [sample.tiles for sample in samples]
        vision = convert_vision(source, staging / "vision", options.dtype, tiles, device)
        decoder = convert_decoder(source, staging, config, samples, vision.image_embeddings, device)
        if samples:
            linears = vision.report + decoder.linears
            report = staging / "quantization_report.json"
            write_report(report, len(samples), linears, decoder.attentions)
        write_manifest(staging, "checkpoint", limits={}, **made_from)


def is_up_to_date(source: WeightSource, output_dir: Path, options: ConvertOptions) -> bool:
    """Whether `convert` would only repeat what `output_dir` already holds."""
    made_from = _made_from(source, options, _load_samples(source, options))
    return is_current(output_dir, "checkpoint", **made_from)


def _made_from(
    source: WeightSource, options: ConvertOptions, samples: list[CalibrationSample]
) -> dict[str, dict[str, Any]]:
    """What the result depends on, for the manifest: the samples themselves, not their file."""
    arguments = asdict(options)
    del arguments["calib_data"], arguments["calib_size"]
    arguments["calibration_sha256"] = calibration_set.digest(samples) if samples else None
    return {"arguments": arguments, "source": source.provenance()}


def _load_samples(source: WeightSource, options: ConvertOptions) -> list[CalibrationSample]:
    """Also the first look at the tokenizer, which must fit the model."""
    tokenizer = Tokenizer(source.tokenizer_dir)
    vocab_size = source.config.decoder.vocab_size
    if tokenizer.num_tokens > vocab_size:
        raise UserError(
            f"{source.tokenizer_dir / FILE_NAME} has {tokenizer.num_tokens} tokens but the model "
            f"has {vocab_size} embeddings; expected the tokenizer that belongs to the checkpoint"
        )
    if not options.is_calibrated:
        return []
    return calibration_set.load_calibration_set(
        options.calib_data, options.calib_size, source.config, tokenizer
    )


def _copy_tokenizer(source: WeightSource, tokenizer_dir: Path) -> None:
    tokenizer_dir.mkdir()
    for path in tokenizer_files(source.tokenizer_dir):
        shutil.copyfile(path, tokenizer_dir / path.name)
