"""Step 2: a checkpoint directory -> an engine directory (vision and decoder for one target)."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

from build.engines.build import BuildRun, build_engine, is_up_to_date
from build.engines.decoder_tensorrt_llm import DEFAULT_OPTIMIZE_FOR, OptimizeFor
from build.engines.kv_cache import KVCacheDtype, KVCacheScales
from build.engines.specification import BuildOptions, require_fit, specify
from build.engines.target import AUTO, require_used
from nvlm.model.vision import VISION_FORMAT
from nvlm.planning import hopper
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.targets import Decoder, Vision
from nvlm.program.command_line import (
    ArgumentParser,
    positive_float,
    positive_int,
    resolve_device,
    run,
)

log = logging.getLogger("nvlm.build_engine")

DEFAULT_WORKERS = 8


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "")
    group = parser.add_argument_group
    add = group("directories").add_argument
    add("--checkpoint_dir", type=Path, required=True, help="input, made by convert_checkpoint.py")
    add("--engine_dir", type=Path, required=True, help="engine directory to make")
    add("--verify", action="store_true", help="hash every file of --checkpoint_dir first")
    add("--if_stale", action="store_true", help="replace --engine_dir only if it is not up to date")
    add("--overwrite", action="store_true", help="replace a finished --engine_dir")
    add("--dry_run", action="store_true", help="print the memory plan as JSON and write nothing")
    add = group("targets", "auto chooses by what this machine has, and logs why.").add_argument
    add("--decoder", choices=(AUTO, *get_args(Decoder)), default=AUTO, help="what runs the decoder")
    add("--vision", choices=(AUTO, *get_args(Vision)), default=AUTO, help="what runs vision")
    add(
        "--vision_precision",
        choices=("float32", "bfloat16", "float16", VISION_FORMAT.name),
        help="number format of vision (default: float32 for onnxruntime, else the checkpoint's)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the engine will run",
    )
    about = "A request beyond them is refused; an answer ends where they are reached."
    add = group("limits", about).add_argument
    add(
        "--max_batch_size",
        type=positive_int,
        default=8,
        metavar="N",
        help="most requests that are decoded together",
    )
    add(
        "--max_num_images",
        type=positive_int,
        default=1,
        metavar="N",
        help="most images of a request",
    )
    add(
        "--max_input_len",
        type=positive_int,
        metavar="N",
        help="most tokens of a prompt, images included (default: from --max_num_images)",
    )
    add(
        "--max_seq_len",
        type=positive_int,
        metavar="N",
        help="most tokens of a prompt and its answer (default: --max_input_len and an answer of "
        "1024)",
    )
    add(
        "--max_num_tokens",
        type=positive_int,
        metavar="N",
        help="most tokens of all requests in one step (default: 8192, or a longer "
        "--max_input_len); clipped to --max_batch_size x --max_seq_len",
    )
    add(
        "--memory_gb",
        type=positive_float,
        metavar="GB",
        help="memory to plan for (default: this machine's)",
    )
    add = group("KV cache").add_argument
    add(
        "--kv_cache_dtype",
        choices=get_args(KVCacheDtype),
        default="auto",
        help="number format of keys and values; auto: as the checkpoint was converted",
    )
    add(
        "--kv_cache_scales",
        choices=get_args(KVCacheScales),
        default="one",
        help="scales of an FP8 KV cache; one: the checkpoint's single scale for K and V; own: a "
        "scale for K and one for V (decoder torch only)",
    )
    add = group("TensorRT and TensorRT-LLM").add_argument
    add(
        "--optimize_for",
        choices=get_args(OptimizeFor),
        help="plugins of --decoder tensorrt_llm, for small or for large batches (default: "
        f"{DEFAULT_OPTIMIZE_FOR})",
    )
    add(
        "--workers",
        type=positive_int,
        metavar="N",
        help="ranks of --decoder tensorrt_llm to build at a time, one a GPU (default: "
        f"{DEFAULT_WORKERS})",
    )
    add(
        "--timing_cache",
        type=Path,
        metavar="DIR",
        help="directory that keeps timings of --vision tensorrt and --decoder tensorrt_llm between "
        "builds",
    )
    add(
        "--compute_capability",
        metavar="X.Y",
        help="GPU that --vision tensorrt_rtx compiles for, as 8.9 (default: this machine's)",
    )
    add(
        "--keep_onnx",
        action="store_true",
        help="keep the ONNX graph that a TensorRT engine is made from",
    )
    return parser


def main() -> None:
    arguments = parser().parse_args()
    optional = ("timing_cache", "workers", "optimize_for")
    given = [f"--{name}" for name in optional if vars(arguments)[name] is not None]
    arguments.optimize_for = arguments.optimize_for or DEFAULT_OPTIMIZE_FOR
    options = BuildOptions(
        **{field.name: getattr(arguments, field.name) for field in fields(BuildOptions)}
    )
    device = resolve_device(arguments.device)
    memory_bytes = total_memory_bytes(device)
    if arguments.memory_gb is not None:
        memory_bytes = int(arguments.memory_gb * 1e9)
    spec = specify(arguments.checkpoint_dir, options, device, memory_bytes, verify=arguments.verify)
    for flag in given:
        require_used(flag, spec.decoder, spec.vision)
    if arguments.if_stale and is_up_to_date(spec, arguments.engine_dir, options):
        log.info("%s is up to date", arguments.engine_dir)
        return
    fits = spec.plan.fits(memory_bytes)
    if arguments.dry_run:
        print(json.dumps({**spec.plan.to_json(), "memory_bytes": memory_bytes, "fits": fits}))
    else:
        require_fit(spec, memory_bytes)
        overwrite = arguments.overwrite or arguments.if_stale
        workers = arguments.workers or DEFAULT_WORKERS
        build = BuildRun(overwrite, workers, arguments.timing_cache)
        build_engine(spec, arguments.engine_dir, options, build)
        log.info("engine written to %s", arguments.engine_dir)
        if "torch" in (spec.decoder, spec.vision) and hopper.has_kernels(device):
            _compile_kernels(arguments.engine_dir, spec.config.world_size)
    for line in spec.plan.lines():
        log.info(line)
    log.info("%s %.1f GB", "fits" if fits else "does NOT fit", memory_bytes / 1e9)


def _compile_kernels(engine_dir: Path, world_size: int) -> None:
    """Compiles in a process that loads the engine as a server does; the engine is whole without."""
    words = ["-m", "runtime.serving.compile_kernels", "--engine_dir", str(engine_dir)]
    if world_size > 1:
        command = shlex.join(["mpirun", "-n", str(world_size), "python", *words])
        log.info("its kernels are compiled at the first start; `%s` keeps them with it", command)
        return
    done = subprocess.run([sys.executable, *words], check=False)
    if done.returncode != 0:
        log.warning("its kernels are not kept; they are compiled at the first start")


if __name__ == "__main__":
    run(main)
