"""Step 3: answers questions about images with an engine directory."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from evaluation.asking.task_run import TaskRun, add_flags, check_flags
from evaluation.tasks import DEFAULT_MAX_NEW_TOKENS as TASK_MAX_NEW_TOKENS
from nvlm.inputs.prompt import DEFAULT_SYSTEM
from nvlm.planning.limits import DEFAULT_MAX_NEW_TOKENS
from nvlm.planning.memory_plan import KV_CACHE_FREE_GPU_MEMORY_FRACTION
from nvlm.program.command_line import ArgumentParser, fraction, positive_int, run
from nvlm.program.errors import UserError
from nvlm.program.launcher import end, rank_from
from runtime.answers.answer_file import answer_json
from runtime.answers.batch import run_batch
from runtime.answers.compare import check, differences, record, report_json
from runtime.decoder.executor import DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.requests.request_file import read_requests
from runtime.requests.sampling import (
    SETTINGS,
    SamplingParams,
    check_target,
    given_settings,
    non_neutral,
    with_sampling,
)
from runtime.requests.show_tiles import write_tiles
from runtime.requests.types import GenerationRequest
from runtime.serving.launch import Program, launch, open_runner
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket

EXIT_SOME_FAILED = 1


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "")
    add = parser.add_argument
    add("--engine_dir", type=Path, required=True, help="made by build_engine.py")
    add("--prompt", help="the question")
    add("--image", type=Path, nargs="+", default=[], help="image files, in order")
    add("--input_file", type=Path, help="JSONL of requests, instead of --prompt")
    add("--output_file", type=Path, help="JSONL of answers; a rerun goes on behind its last line")
    add("--system", default=DEFAULT_SYSTEM, help="system message")
    add(
        "--prompt_format",
        choices=("hf", "megatron"),
        help="template (default hf; with --task megatron)",
    )
    add(
        "--max_new_tokens",
        type=positive_int,
        help=f"length of an answer (default {DEFAULT_MAX_NEW_TOKENS}; {TASK_MAX_NEW_TOKENS} with "
        "--task)",
    )
    add("--max_num_tiles", type=positive_int, help="tiles of an image's grid, at most")
    for setting in SETTINGS:
        add(f"--{setting.name}", type=setting.type, help=setting.help)
    add("--stop", nargs="+", default=[], help="strings that end the answer")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--kv_cache_free_gpu_memory_fraction",
        type=fraction,
        default=KV_CACHE_FREE_GPU_MEMORY_FRACTION,
        help="of what is free after loading, for decoder tensorrt_llm",
    )
    add(
        "--compare",
        type=Path,
        metavar="ENGINE_DIR",
        help="run the requests through this engine too (one for torch) and report what differs",
    )
    add("--show_tiles", type=Path, metavar="PNG", help="draw the tiles and their tags into a file")
    add("--streaming", action="store_true", help="print the answer as it comes")
    add("--json", action="store_true", help="print one JSON object")
    add_flags(parser)
    return parser


def default_request(arguments: object) -> GenerationRequest:
    """The flags as a request; its content is the single question."""
    given = vars(arguments)
    return GenerationRequest.images_first(
        given["prompt"] or "",
        tuple(given["image"]),
        system=given["system"],
        prompt_format=given["prompt_format"] or "hf",
        max_new_tokens=given["max_new_tokens"] or DEFAULT_MAX_NEW_TOKENS,
        max_num_tiles=given["max_num_tiles"],
        stop=tuple(given["stop"]),
        sampling=with_sampling(SamplingParams(), given_settings(given)),
    )


def stream(runner: Runner, request: GenerationRequest) -> None:
    """Prints text as it comes."""
    for piece in runner.stream(request):
        print(piece.text, end="", flush=True)
    print(flush=True)


def _check_flags(arguments: argparse.Namespace) -> None:
    check_flags(arguments)
    if arguments.task:
        return
    if (arguments.prompt is None) == (arguments.input_file is None):
        raise UserError("give either --prompt or --input_file")
    for name in ("output_file", "streaming", "show_tiles"):
        if arguments.compare and vars(arguments)[name]:
            raise UserError(f"--compare prints a report; it takes no --{name}, leave that out")
    if not arguments.compare and (arguments.input_file is None) != (arguments.output_file is None):
        raise UserError("--input_file and --output_file go together")
    if arguments.streaming and (arguments.json or arguments.input_file):
        raise UserError("--streaming prints text; it does not go with --json or --input_file")
    if arguments.input_file and (arguments.image or (arguments.json and not arguments.compare)):
        flag = "--image" if arguments.image else "--json"
        raise UserError(f"{flag} goes with --prompt; a batch has its images in the request lines")
    if arguments.show_tiles and not arguments.image:
        raise UserError("--show_tiles draws the images of --image; give one")


def compare(
    arguments: argparse.Namespace,
    requests: dict[str, GenerationRequest],
    device: torch.device,
    open_leader: Callable[[], Runner],
) -> None:
    """Both engines one after the other, then what differs; `requests` by where they stand."""
    for engine_dir in (arguments.engine_dir, arguments.compare):
        check(engine_dir, requests)
    asked = list(requests.values())
    with open_leader() as runner:
        engine = record(runner, asked)
    with open_runner(arguments.compare, device, os.environ) as runner:
        reference = record(runner, asked)
    if arguments.json:
        print(json.dumps(report_json(engine, reference)))
        return
    for number, difference in enumerate(differences(engine, reference), start=1):
        print(f"request {number}: {difference.line()}")
    print(f"{engine.tokens_per_s:.1f} tokens/s, reference {reference.tokens_per_s:.1f}")


def parse() -> Program:
    arguments = parser().parse_args()
    _check_flags(arguments)
    options = DecoderOptions(
        arguments.kv_cache_free_gpu_memory_fraction, gather_logits=arguments.compare is not None
    )
    return Program(arguments.engine_dir, arguments.device, options, partial(lead, arguments))


def main() -> int:
    return launch(os.environ, parse)


def lead(
    arguments: argparse.Namespace, device: torch.device, open_leader: Callable[[], Runner]
) -> int:
    """What rank 0 does, or the only one."""
    request = default_request(arguments)
    if non_neutral(request.sampling):
        check_target(request.sampling, EngineDir.read(arguments.engine_dir).decoder_target)
    task_run = TaskRun.read(arguments, request) if arguments.task else None
    if task_run:
        task_run.check(EngineDir.read(arguments.engine_dir))
    lines = read_requests(arguments.input_file, request) if arguments.input_file else []
    if arguments.compare:
        for line in lines:
            if isinstance(line.request, UserError):
                raise line.request
        asked = {
            f"{arguments.input_file} line {line.number}": line.request
            for line in lines
            if isinstance(line.request, GenerationRequest)
        }
        compare(arguments, asked or {"the request": request}, device, open_leader)
        return 0
    with open_leader() as runner:
        if task_run:
            return EXIT_SOME_FAILED if task_run.run(runner) else 0
        if arguments.input_file:
            num_errors = run_batch(runner, lines, arguments.output_file)
            requests = "1 request" if len(lines) == 1 else f"{len(lines)} requests"
            print(f"{requests}, {num_errors} failed", file=sys.stderr)
            return EXIT_SOME_FAILED if num_errors else 0
        if arguments.show_tiles:
            shown = Ticket(request)
            runner.prepare(shown)
            write_tiles(shown.images, arguments.show_tiles)
        if arguments.streaming:
            stream(runner, request)
            return 0
        result = runner.generate(request)
    answer = json.dumps(answer_json(result), ensure_ascii=False)
    print(answer if arguments.json else result.text)
    return 0


if __name__ == "__main__":
    run(main, rank=rank_from(os.environ), end=end)
