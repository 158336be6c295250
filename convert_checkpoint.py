"""Step 1: an NVLM-D checkpoint -> a TensorRT-LLM checkpoint directory (FP8 by default), or a folder
that other engines load."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from build.conversion.calibration.calibration_set import BUILT_IN
from build.conversion.convert import TENSORRT_LLM, ConvertOptions, convert, is_up_to_date
from build.conversion.output_folder import OutputFormat
from build.conversion.plan import plan_conversion
from build.conversion.speeds import measure_speeds
from build.exports import export
from build.exports.checkpoint_source import CheckpointSource
from build.exports.choose import (
    OUTPUT_FORMATS,
    TRTLLM,
    Choice,
    check_checkpoint,
    warn_of_projector,
)
from build.sources.detect import open_source, read_config
from build.sources.hugging_face import HuggingFaceSource
from nvlm.model.config import PROJECTOR_NORM_EPS, NVLMConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import QUANTIZED, UNQUANTIZED
from nvlm.program.command_line import (
    ArgumentParser,
    positive_float,
    positive_int,
    resolve_device,
    run,
)
from nvlm.program.errors import UserError

log = logging.getLogger("nvlm.convert_checkpoint")

CALIB_SIZE = 16
ALGORITHMS: dict[str, str | None] = {**{name: name for name in QUANTIZED}, UNQUANTIZED.name: None}


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "")
    group = parser.add_argument_group
    add = group("directories").add_argument
    add("--model_dir", type=Path, help="input: NVLM-D as published (Hugging Face or Megatron)")
    add(
        "--checkpoint_dir",
        type=Path,
        help="input of an export instead of --model_dir: a finished checkpoint directory",
    )
    add("--tokenizer_dir", type=Path, help="folder of the tokenizer's files (default: --model_dir)")
    add("--output_dir", type=Path, required=True, help="directory to make")
    add("--if_stale", action="store_true", help="replace --output_dir only if it is not up to date")
    add("--overwrite", action="store_true", help="replace a finished --output_dir")
    add("--dry_run", action="store_true", help="print the plan as JSON and write nothing")
    add = group("output").add_argument
    add(
        "--output_format",
        choices=OUTPUT_FORMATS,
        default=TRTLLM,
        help="trtllm: a checkpoint directory for build_engine.py; the others: a folder in Hugging "
        "Face's layout for other engines",
    )
    add("--text_only", action="store_true", help="export the decoder alone, as Qwen2ForCausalLM")
    add(
        "--tp_size",
        type=positive_int,
        default=1,
        metavar="N",
        help="tensor parallel ranks: they share every layer",
    )
    add(
        "--pp_size",
        type=positive_int,
        default=1,
        metavar="N",
        help="pipeline stages: the layers are divided among them",
    )
    add = group("number formats").add_argument
    add(
        "--quant_algo",
        choices=ALGORITHMS,
        default="FP8",
        help="format of the decoder's linears",
    )
    add(
        "--kv_cache_quant_algo",
        choices=ALGORITHMS,
        help="format of the KV cache (default: as --quant_algo)",
    )
    add(
        "--vision_quant_algo",
        choices=ALGORITHMS,
        help="format of an exported ViT's linears (default: none)",
    )
    add(
        "--exclude_modules",
        nargs="+",
        metavar="NAME",
        help="linears that stay in --dtype, as the report names them "
        "(transformer.layers.0.mlp.proj), or patterns of them (*.mlp.proj)",
    )
    add(
        "--quantize_lm_head",
        action="store_true",
        help="quantise the decoder's head as its other linears (default: it stays in --dtype)",
    )
    add("--dtype", choices=TORCH_DTYPES, default="bfloat16", help="type of what stays unquantised")
    add = group("calibration").add_argument
    add(
        "--calib_data",
        type=Path,
        action="once",
        help="samples: a JSONL of prompts and images, a folder of images, or a .txt of prompts "
        "(default: built in)",
    )
    add(
        "--calib_size",
        type=positive_int,
        metavar="N",
        help=f"most samples to use (default: {CALIB_SIZE})",
    )
    add(
        "--projector_norm_eps",
        type=positive_float,
        metavar="EPS",
        help="epsilon of the projector's LayerNorm (default: 1e-5 from Hugging Face, 1e-6 from "
        "Megatron, as each runs it)",
    )
    add(
        "--calib_cache",
        type=Path,
        metavar="JSON",
        help="quantization_report.json of an earlier conversion of these weights: take its amax "
        "and calibrate nothing",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where calibration runs")
    return parser


def require_used(arguments: Namespace, options: ConvertOptions) -> None:
    """Refuses flags of the calibration that would do nothing."""
    names = ("calib_data", "calib_size", "calib_cache")
    given = [name for name in names if getattr(arguments, name) is not None]
    if given and not options.is_quantised:
        raise UserError(
            f"--{given[0]} needs --quant_algo FP8 or --kv_cache_quant_algo FP8, and without either "
            "nothing is calibrated; leave it out"
        )
    if "calib_cache" in given and len(given) > 1:
        raise UserError(
            f"--{given[0]} needs a calibration, and --calib_cache takes the place of one; leave "
            "one of them out"
        )


def dry_run(
    model: NVLMConfig, options: ConvertOptions, output_format: OutputFormat, arguments: Namespace
) -> None:
    """Prints the plan, timed at this machine's speeds; writes nothing that stays."""
    config = options.config(model)
    is_calibrated = options.is_quantised and options.calib_cache is None
    speeds = measure_speeds(
        arguments.model_dir, arguments.output_dir, resolve_device(arguments.device)
    )
    num_samples = options.calib_size if is_calibrated else 0
    plan = plan_conversion(model, config, num_samples, speeds)
    if output_format.kind == "export":
        rank_bytes = [output_format.needed_bytes(model, config)]
        plan = replace(plan, rank_bytes=rank_bytes, vision_bytes=0)
    print(json.dumps(plan.to_json()))
    for line in plan.lines():
        log.info(line)


def export_checkpoint(arguments: Namespace, choice: Choice) -> None:
    """Exports from a finished checkpoint directory, whose choices stand."""
    source = CheckpointSource(arguments.checkpoint_dir)
    warn_of_projector(source.config.vision.projector_norm_eps, choice.is_text_only)
    output_format = choice.made(None)
    if arguments.if_stale and export.is_up_to_date(source, arguments.output_dir, output_format):
        log.info("%s is up to date", arguments.output_dir)
        return
    overwrite = arguments.overwrite or arguments.if_stale
    export.export(source, arguments.output_dir, output_format, overwrite=overwrite)
    log.info("export written to %s", arguments.output_dir)


def main() -> None:
    flags = parser()
    arguments = flags.parse_args()
    vision_quant_algo = ALGORITHMS[arguments.vision_quant_algo or UNQUANTIZED.name]
    choice = Choice(arguments.output_format, arguments.text_only, vision_quant_algo)
    choice.check()
    if arguments.checkpoint_dir is not None:
        check_checkpoint(choice, flags.given, arguments.dry_run)
        export_checkpoint(arguments, choice)
        return
    if arguments.model_dir is None:
        raise UserError(
            "--model_dir is required, NVLM-D's folder; an export takes --checkpoint_dir instead; "
            "see --help"
        )
    options = ConvertOptions(
        quant_algo=ALGORITHMS[arguments.quant_algo],
        kv_cache_quant_algo=ALGORITHMS[arguments.kv_cache_quant_algo or arguments.quant_algo],
        dtype=arguments.dtype,
        calib_data=arguments.calib_data or BUILT_IN,
        calib_size=arguments.calib_size or CALIB_SIZE,
        calib_cache=arguments.calib_cache,
        tp_size=arguments.tp_size,
        pp_size=arguments.pp_size,
        exclude_modules=tuple(dict.fromkeys(arguments.exclude_modules or ())),
        quantize_lm_head=arguments.quantize_lm_head,
    )
    require_used(arguments, options)
    choice.check_conversion(options, arguments.projector_norm_eps)
    if arguments.dry_run:
        model = read_config(arguments.model_dir, tokenizer_dir=arguments.tokenizer_dir)
        choice.check_model(options, model)
        planned: OutputFormat = choice.made(None) if choice.is_export else TENSORRT_LLM
        dry_run(model, options, planned, arguments)
        return
    # Readers of an export run one epsilon, whatever the source's own software does.
    exported_eps = PROJECTOR_NORM_EPS if choice.is_export else None
    source = open_source(
        arguments.model_dir,
        tokenizer_dir=arguments.tokenizer_dir,
        projector_norm_eps=arguments.projector_norm_eps or exported_eps,
    )
    choice.check_model(options, source.config)
    output_format: OutputFormat = TENSORRT_LLM
    if choice.is_export:
        is_published = isinstance(source, HuggingFaceSource)
        output_format = choice.made(arguments.model_dir if is_published else None)
    if arguments.if_stale and is_up_to_date(source, arguments.output_dir, options, output_format):
        log.info("%s is up to date", arguments.output_dir)
        return
    device = resolve_device(arguments.device)
    overwrite = arguments.overwrite or arguments.if_stale
    convert(
        source,
        arguments.output_dir,
        options,
        device,
        output_format=output_format,
        overwrite=overwrite,
        model_name=arguments.model_dir.resolve().name,
    )
    log.info("%s written to %s", output_format.kind, arguments.output_dir)


if __name__ == "__main__":
    run(main)
