"""Step 1: an NVLM-D checkpoint -> a TensorRT-LLM checkpoint directory (FP8 by default)."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path

from build.checkpoint.calibration_set import BUILT_IN
from build.checkpoint.convert import ConvertOptions, convert, is_up_to_date
from build.checkpoint.speeds import measure_speeds
from build.sources.hugging_face import HuggingFaceSource, read_index
from nvlm.checkpoint_config import QuantAlgo
from nvlm.command_line import ArgumentParser, positive_int, resolve_device, run
from nvlm.config import NVLMConfig
from nvlm.conversion_plan import plan_conversion
from nvlm.dtypes import TORCH_DTYPES

log = logging.getLogger("nvlm.convert_checkpoint")

ALGORITHMS: dict[str, QuantAlgo | None] = {"FP8": "FP8", "none": None}


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "")
    add = parser.add_argument
    add("--model_dir", type=Path, required=True, help="NVLM-D as published (Hugging Face)")
    add("--output_dir", type=Path, required=True, help="checkpoint directory to make")
    add("--quant_algo", choices=ALGORITHMS, default="FP8", help="of the decoder's linears")
    add("--kv_cache_quant_algo", choices=ALGORITHMS, help="default: as --quant_algo")
    add("--dtype", choices=TORCH_DTYPES, default="bfloat16", help="of what is not quantised")
    add("--tp_size", type=positive_int, default=1, help="ranks that share every layer")
    add("--pp_size", type=positive_int, default=1, help="stages that the layers are divided into")
    add(
        "--calib_data",
        type=Path,
        default=BUILT_IN,
        help="JSONL of prompts and images, folder of images, or .txt of prompts "
        "(default: built in)",
    )
    add("--calib_size", type=positive_int, default=16, help="samples used, at most")
    add(
        "--calib_cache",
        type=Path,
        help="quantization_report.json of an earlier conversion of these weights: its amax are "
        "taken, nothing is calibrated",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="calibration runs there")
    add("--dry_run", action="store_true", help="print the plan as JSON and write nothing")
    add("--if_stale", action="store_true", help="nothing if up to date, else as --overwrite")
    add("--overwrite", action="store_true", help="replace a finished --output_dir")
    return parser


def dry_run(model: NVLMConfig, options: ConvertOptions, arguments: Namespace) -> None:
    """Prints the plan, timed at this machine's speeds; writes nothing that stays."""
    config = options.config(model)
    is_calibrated = options.is_quantised and options.calib_cache is None
    speeds = measure_speeds(
        arguments.model_dir, arguments.output_dir, resolve_device(arguments.device)
    )
    num_samples = options.calib_size if is_calibrated else 0
    plan = plan_conversion(model, config, num_samples, speeds)
    print(json.dumps(plan.to_json()))
    for line in plan.lines():
        log.info(line)


def main() -> None:
    arguments = parser().parse_args()
    options = ConvertOptions(
        quant_algo=ALGORITHMS[arguments.quant_algo],
        kv_cache_quant_algo=ALGORITHMS[arguments.kv_cache_quant_algo or arguments.quant_algo],
        dtype=arguments.dtype,
        calib_data=arguments.calib_data,
        calib_size=arguments.calib_size,
        calib_cache=arguments.calib_cache,
        tp_size=arguments.tp_size,
        pp_size=arguments.pp_size,
    )
    if arguments.dry_run:
        dry_run(read_index(arguments.model_dir), options, arguments)
        return
    source = HuggingFaceSource(arguments.model_dir)
    if arguments.if_stale and is_up_to_date(source, arguments.output_dir, options):
        log.info("%s is up to date", arguments.output_dir)
        return
    device = resolve_device(arguments.device)
    overwrite = arguments.overwrite or arguments.if_stale
    convert(source, arguments.output_dir, options, device, overwrite=overwrite)
    log.info("checkpoint written to %s", arguments.output_dir)


if __name__ == "__main__":
    run(main)
