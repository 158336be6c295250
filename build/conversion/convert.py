"""Step 1 on one page: model directory -> TensorRT-LLM checkpoint directory, or another format.

Work is a list of units: ViT embeddings, its layers, projector, decoder embedding, its layers, head.
Each reads its tensors once and writes all ranks' parts; the journal knows which units are done.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from build.conversion.calibration.calibration_set import BUILT_IN, Calibration, load_calibration_set
from build.conversion.calibration.row_file import RowFile
from build.conversion.decoder_step import DecoderStep
from build.conversion.dummy_heads import converted_vision_config
from build.conversion.excluded_modules import check_excluded, check_head
from build.conversion.journal import Journal
from build.conversion.output_folder import OutputFolder, OutputFormat
from build.conversion.pipeline import DEFAULT_BUFFERS, Buffers
from build.conversion.report.quantization_report import QuantizationReport, from_records
from build.conversion.report.report_page import Origin, write_page
from build.conversion.run_units import run_units
from build.conversion.tensorrt_llm_folder import TensorRTLLMFormat
from build.conversion.unit import Unit
from build.conversion.vision_step import VisionStep
from build.output.output_dir import OutputPlace, staged_directory
from build.sources.source import WeightSource
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.code_digest import code_digest
from nvlm.formats.manifest import is_current, sha256_of, write_manifest
from nvlm.formats.mapping import check_divides
from nvlm.formats.scale_dtype import SCALE_DTYPE
from nvlm.formats.tensor_names import HEAD
from nvlm.inputs.tokenizer import TOKENIZER_FILE, Tokenizer
from nvlm.model.config import NVLMConfig, VisionConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.planning.memory_plan import calibration_bytes
from nvlm.program.errors import UserError

log = logging.getLogger(__name__)

TENSORRT_LLM = TensorRTLLMFormat()


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the command line chooses."""

    quant_algo: str | None = "FP8"  # of linears: "FP8"; None: none
    kv_cache_quant_algo: str | None = "FP8"  # of keys and values: "FP8"; None: none
    dtype: str = "bfloat16"  # of what is not quantised
    calib_data: Path = BUILT_IN  # JSON lines of samples
    calib_size: int = 16  # samples to measure, at most
    calib_cache: Path | None = None  # an earlier conversion's report, instead of calibration
    tp_size: int = 1  # tensor parallel ranks
    pp_size: int = 1  # pipeline parallel ranks
    exclude_modules: tuple[str, ...] = ()  # patterns of linears that stay in `dtype`
    quantize_lm_head: bool = False  # the head as the other linears

    @property
    def is_quantised(self) -> bool:
        return self.quant_algo is not None or self.kv_cache_quant_algo is not None

    def config(self, model: NVLMConfig) -> CheckpointConfig:
        """Raises `UserError` where the decoder does not divide into the ranks asked for, or has no
        linear of an excluded name."""
        try:
            check_divides(model.decoder, self.tp_size, self.pp_size)
        except UserError as error:
            raise UserError(f"--{error}") from None
        config = CheckpointConfig(
            model.decoder,
            self.dtype,
            self.quant_algo,
            self.kv_cache_quant_algo,
            self.tp_size,
            self.pp_size,
            self.exclude_modules,
            quantize_lm_head=self.quantize_lm_head,
        )
        check_head(config)
        check_excluded(config)
        return config


def convert(
    source: WeightSource,
    output_dir: Path,
    options: ConvertOptions,
    device: torch.device,
    *,
    output_format: OutputFormat = TENSORRT_LLM,
    overwrite: bool = False,
    buffers: Buffers = DEFAULT_BUFFERS,
    model_name: str = "NVLM-D",
) -> None:
    """Converts and, to quantise, calibrates. `output_dir` appears whole or not at all. What an
    interrupted run has done stays beside it, and the next run resumes from it. `model_name` heads
    the report."""
    config = options.config(source.config)
    calibration = _load_calibration(source, options)
    # Before the first byte is read.
    made_from = _made_from(source, options, output_format, calibration)
    is_text_only = options.is_quantised and calibration.is_text_only
    if is_text_only and output_format.needs_vision_scales:
        raise UserError(
            "--vision_quant_algo FP8 needs calibration samples with pictures, found text alone; "
            "give --calib_data that holds some, or leave --vision_quant_algo out"
        )
    if is_text_only and output_format.kind == "checkpoint":
        log.warning(
            "no calibration sample holds a picture, so vision gets no FP8 scales and "
            "build_engine.py no --vision_precision FP8; give --calib_data that holds some"
        )
    journal_of = partial(Journal.open, made_from=_fingerprint(made_from, device))
    kind = output_format.kind
    place = OutputPlace(output_dir, "--output_dir", kind, overwrite)
    needed_bytes = output_format.needed_bytes(source.config, config) + calibration_bytes(
        config, source.config.vision, calibration.num_tiles, calibration.num_tokens
    )

    def is_worth_keeping(staging: Path) -> bool:
        return is_current(staging, kind, **made_from) or journal_of(staging).num_done > 0

    with torch.inference_mode(), staged_directory(place, needed_bytes, is_worth_keeping) as staging:
        if is_current(staging, kind, **made_from):
            return  # killed before it got its name
        journal = journal_of(staging)
        vision = converted_vision_config(source)
        folder = output_format.folder(source, vision, config)
        units = _units(source.config.vision, vision, config, calibration, device, folder, staging)
        entries = run_units(source, units, folder.files(), journal, staging, buffers)
        report = None
        if options.is_quantised:
            report = from_records(journal.records, *calibration.counts, options.dtype)
            report.write(staging / layout.REPORT)
            warning = report.warning() if options.kv_cache_quant_algo is not None else None
            if warning is not None:
                log.warning("%s", warning)
            write_page(staging, report, _origin(model_name, config, options))
        folder.finish(staging, report)
        write_manifest(staging, kind, limits={}, known=entries, **made_from)


def is_up_to_date(
    source: WeightSource,
    output_dir: Path,
    options: ConvertOptions,
    output_format: OutputFormat = TENSORRT_LLM,
) -> bool:
    """Whether `convert` would only repeat what `output_dir` already holds."""
    calibration = _load_calibration(source, options)
    made_from = _made_from(source, options, output_format, calibration)
    return is_current(output_dir, output_format.kind, **made_from)


def _origin(model_name: str, config: CheckpointConfig, options: ConvertOptions) -> Origin:
    decoder = config.decoder
    shape = f"{decoder.num_hidden_layers} layers of {decoder.hidden_size:,}"
    if options.calib_cache is not None:
        samples = f"nothing: the amax are those of {options.calib_cache}"
    elif options.calib_data == BUILT_IN:
        samples = "the built-in samples"
    else:
        samples = options.calib_data.name
    return Origin(f"{model_name} ({shape})", time.strftime("%Y-%m-%d"), samples)


def _made_from(
    source: WeightSource,
    options: ConvertOptions,
    output_format: OutputFormat,
    calibration: Calibration,
) -> dict[str, dict[str, Any]]:
    """What the result depends on, for the manifest: the samples themselves, not their file."""
    arguments = asdict(options)
    for name in ("calib_data", "calib_size", "calib_cache"):
        del arguments[name]
    if not options.quantize_lm_head:
        del arguments["quantize_lm_head"]  # older versions had no such choice
    arguments["calibration_sha256"] = calibration.sha256
    arguments[SCALE_DTYPE] = options.dtype  # older versions left scales in float32, and this out
    arguments |= output_format.arguments(source)
    return {"arguments": arguments, "source": source.provenance()}


def _fingerprint(made_from: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What an interrupted run must share with the one that resumes it, for the same bytes."""
    versions = {"code": code_digest(), "torch": torch.__version__}
    return {**made_from, "versions": versions, "device": device.type}


def _load_calibration(source: WeightSource, options: ConvertOptions) -> Calibration:
    """Also the first look at the tokenizer, which must fit the model."""
    tokenizer = Tokenizer(source.tokenizer_dir)
    vocab_size = source.config.decoder.vocab_size
    if tokenizer.num_tokens > vocab_size:
        raise UserError(
            f"{source.tokenizer_dir / TOKENIZER_FILE} has {tokenizer.num_tokens} tokens but the "
            f"model has {vocab_size} embeddings; expected the tokenizer that belongs to the "
            "checkpoint"
        )
    if not options.is_quantised:
        return Calibration()
    if options.calib_cache is not None:
        cache = QuantizationReport.read(options.calib_cache)
        if options.quantize_lm_head and not cache.linears_of(HEAD):
            raise UserError(
                f"{options.calib_cache} has no row {HEAD}, expected one for --quantize_lm_head; "
                "leave --calib_cache out to calibrate again, or --quantize_lm_head"
            )
        if cache.scale_dtype != options.dtype:
            log.info(
                "%s has %s scales: its amax are taken and scales are rounded up to %s, but the "
                "errors that it reports stay those of its own scales",
                options.calib_cache,
                cache.scale_dtype,
                options.dtype,
            )
        return Calibration(cache=cache, sha256=sha256_of(options.calib_cache))
    return load_calibration_set(options.calib_data, options.calib_size, source.config, tokenizer)


def _units(
    published: VisionConfig,
    vision: VisionConfig,
    config: CheckpointConfig,
    calibration: Calibration,
    device: torch.device,
    folder: OutputFolder,
    staging: Path,
) -> list[Unit]:
    numbers = count()

    def next_states(num_rows: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> RowFile:
        path = staging / f"{layout.STATES_PREFIX}{next(numbers)}"
        return RowFile(path, num_rows, row_shape, dtype)

    dtype = TORCH_DTYPES[config.dtype]
    vision_units: list[Unit] = []
    image_embeddings = None
    if folder.has_vision or calibration.num_tiles:
        step = VisionStep(published, vision, dtype, calibration, device, folder)
        vision_units = step.units(next_states)
        image_embeddings = vision_units[-1].states
    decoder = DecoderStep(config, calibration, device, folder)
    return vision_units + decoder.units(image_embeddings, next_states)
