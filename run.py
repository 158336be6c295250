"""Step 3: answers questions about images with an engine directory."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from nvlm.formats.scale_dtype import what_differs
from nvlm.inputs.images import Page, PictureRules
from nvlm.inputs.picture_source import picture_source
from nvlm.inputs.prompt import DEFAULT_SYSTEM
from nvlm.planning.limits import DEFAULT_MAX_NEW_TOKENS
from nvlm.program.command_line import ArgumentParser, positive_int, run
from nvlm.program.errors import UserError, shown
from nvlm.program.launcher import end, rank_from
from nvlm.program.process import set_most_pixels
from runtime.answers.answer_file import answer_json
from runtime.answers.batch import run_batch, summary
from runtime.answers.chat import chat
from runtime.answers.compare import check, differences, record, report_json
from runtime.answers.cut_answer import warn_if_cut
from runtime.decoder.xgrammar_schema import check_guide
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on
from runtime.requests.flags import add_guide_flags, add_request_flags, request_of
from runtime.requests.messages import Conversation, question
from runtime.requests.request_file import RequestLine, read_messages, read_requests
from runtime.requests.sampling import check_target, non_neutral, require_consistent
from runtime.requests.show_tiles import write_tiles
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.launch import Program, add_engine_flags, engine_options, launch
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket

log = logging.getLogger("nvlm.run")

EXIT_SOME_FAILED = 1


class _Benchmarks(argparse.Action):
    """--task was run.py's once: refused before what goes with it could be."""

    def __call__(self, _parser: Any, _arguments: Any, task: Any, _flag: Any = None) -> NoReturn:
        name = task or "TASK"
        raise UserError(f"benchmarks are `evaluate.py generate --task {name}`, with the same flags")


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "")
    add_engine_flags(parser)
    add = parser.add_argument_group(
        "question", "Give --prompt, --messages, --chat or --input_file."
    ).add_argument
    add("--prompt", action="once", help="the question; the next image stands where it has <image>")
    add(
        "--messages",
        type=Path,
        action="once",
        metavar="JSON",
        help="file of a conversation: a JSON list of messages",
    )
    add(
        "--chat",
        action="store_true",
        help="talk in a terminal: questions come from stdin, one a line",
    )
    add("--image", nargs="+", default=[], help="image files, file:// or data: URLs, in order")
    add(
        "--page",
        type=_page,
        action="once",
        help="page or frame of the images to read: a number from 1, or all (default: the first)",
    )
    add(
        "--max_image_pixels",
        type=positive_int,
        metavar="N",
        help="largest image to read, in pixels (default: 178,956,970, where Pillow stops)",
    )
    add(
        "--input_file",
        type=Path,
        action="once",
        metavar="JSONL",
        help="file of requests, one a line; needs --output_file",
    )
    add_request_flags(parser, prompt_format="hf", max_new_tokens=DEFAULT_MAX_NEW_TOKENS)
    add_guide_flags(parser)
    add = parser.add_argument_group("output", "By default the answer is printed.").add_argument
    add("--streaming", action="store_true", help="print the answer as the model writes it")
    add("--json", action="store_true", help="print one JSON object: the answer, counts, timings")
    add(
        "--output_file",
        type=Path,
        metavar="JSONL",
        help="file of the answers to --input_file; a rerun resumes after its last line",
    )
    add(
        "--compare",
        type=Path,
        action="once",
        metavar="ENGINE_DIR",
        help="answer by this engine too (one of decoder torch) and report what differs",
    )
    add("--show_tiles", type=Path, metavar="PNG", help="draw the tiles of --image and their tags")
    add("--task", nargs="?", action=_Benchmarks, help=argparse.SUPPRESS)
    return parser


def default_request(arguments: argparse.Namespace) -> GenerationRequest:
    """The flags as a request; it asks what --prompt or --messages says."""
    images = tuple(map(picture_source, arguments.image))
    asked = Conversation()
    if arguments.prompt is not None:
        asked = Conversation(content=question(arguments.prompt, images))
    elif arguments.messages is not None:
        has_system = arguments.system != DEFAULT_SYSTEM
        asked = read_messages(arguments.messages, images, has_system=has_system)
    pictures = PictureRules(page=arguments.page)
    return replace(request_of(arguments), pictures=pictures, **asked)


def _page(text: str) -> Page:
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither a page's number from 1 nor all")
    return int(text)


def stream(runner: Runner, request: GenerationRequest) -> GenerationResult:
    """Prints text as it comes."""
    result: GenerationResult | None = None
    for piece in runner.stream(request):
        print(piece.text, end="", flush=True)
        result = piece.result
    print(flush=True)
    assert result is not None, "the last piece has the result"
    return result


def _check_flags(arguments: argparse.Namespace) -> None:
    ways = ("prompt", "messages", "input_file", "chat")
    given = [f"--{name}" for name in ways if vars(arguments)[name] not in (None, False)]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given; " if given else ""
        raise UserError(f"{found}give either --prompt or --input_file, --messages or --chat")
    for name in ("output_file", "compare", "show_tiles", "json"):
        if arguments.chat and vars(arguments)[name]:
            raise UserError(f"--chat prints each answer as it comes; it takes no --{name}")
    for name in ("output_file", "streaming", "show_tiles"):
        if arguments.compare and vars(arguments)[name]:
            raise UserError(f"--compare prints a report; it takes no --{name}, leave that out")
    if not arguments.compare and (arguments.input_file is None) != (arguments.output_file is None):
        raise UserError("--input_file and --output_file go together; give both")
    source, output = arguments.input_file, arguments.output_file
    are_there = output and os.path.exists(source) and os.path.exists(output)
    if are_there and os.path.samefile(source, output):
        raise UserError(
            f"--input_file and --output_file are both {source}; give the answers another file"
        )
    if arguments.streaming and (arguments.json or arguments.input_file):
        raise UserError("--streaming prints text; it does not go with --json or --input_file")
    if arguments.input_file and (arguments.image or (arguments.json and not arguments.compare)):
        flag = "--image" if arguments.image else "--json"
        raise UserError(f"{flag} goes with --prompt; a batch has its images in the request lines")
    if arguments.n is not None and arguments.n > 1 and (arguments.streaming or arguments.compare):
        flag = "--streaming" if arguments.streaming else "--compare"
        raise UserError(f"{flag} takes one answer and --n is {arguments.n}; leave one of them out")
    for name in ("logprobs", "prompt_logprobs"):
        is_given = vars(arguments)[name] not in (None, False)
        if is_given and not (arguments.json or arguments.input_file):
            raise UserError(f"--{name} is a part of the JSON answer; give --json too")
    if arguments.page is not None and not (arguments.image or arguments.input_file):
        raise UserError("--page chooses a page of --image; give one")
    if arguments.show_tiles and not arguments.image:
        raise UserError("--show_tiles draws the images of --image; give one")


def _asked(
    arguments: argparse.Namespace, request: GenerationRequest, lines: list[RequestLine]
) -> dict[str, GenerationRequest]:
    """What --compare asks, by where it stands. Raises what is wrong with a line."""
    asked: dict[str, GenerationRequest] = {}
    for line in lines:
        if isinstance(line.request, UserError):
            raise line.request
        if line.request.sampling.n > 1:
            raise UserError(
                f"--compare takes one answer a request, and line {line.number} has n; leave it out"
            )
        asked[f"{arguments.input_file} line {line.number}"] = line.request
    asked = asked or {"the request": request}
    # Both engines draw with one seed.
    return {name: replace(each, sampling=each.sampling.seeded()) for name, each in asked.items()}


def compare(
    arguments: argparse.Namespace,
    requests: dict[str, GenerationRequest],
    device: torch.device,
    open_runner: Callable[[], Runner],
) -> None:
    """Both engines one after the other, then what differs; `requests` by where they stand."""
    caches = []
    for engine_dir in (arguments.engine_dir, arguments.compare):
        check(engine_dir, requests)
        engine = EngineDir.read(engine_dir)
        config = engine.checkpoint_config
        warning = what_differs(engine_dir, engine.scale_dtype(), config)
        if warning is not None:
            log.warning(warning)
        caches.append(config.kv_cache_name)
    asked = list(requests.values())
    with open_runner() as runner:
        answers = record(runner, asked)
    with Runner.open(arguments.compare, device, environment=os.environ) as runner:
        reference = record(runner, asked)
    if arguments.json:
        report = report_json(answers, reference)
        print(json.dumps({**report, "kv_cache": caches[0], "reference_kv_cache": caches[1]}))
        return
    for number, difference in enumerate(differences(answers, reference), start=1):
        print(f"request {number}: {difference.line()}")
    print(f"KV cache {caches[0]}, reference {caches[1]}")
    print(f"{answers.tokens_per_s:.1f} tokens/s, reference {reference.tokens_per_s:.1f}")


def lead(
    arguments: argparse.Namespace, device: torch.device, open_runner: Callable[[], Runner]
) -> int:
    """What rank 0 does, or the only one."""
    request = default_request(arguments)
    if arguments.prompt is not None:
        require_consistent(request.sampling, request.max_new_tokens)
    if non_neutral(request.sampling) or request.guide is not None:
        decoder_target = EngineDir.read(arguments.engine_dir).decoder_target
        check_target(request.sampling, decoder_target)
        if request.guide is not None:
            check_guide(request.guide, decoder_target)
    lines = read_requests(arguments.input_file, request) if arguments.input_file else []
    if arguments.compare:
        compare(arguments, _asked(arguments, request, lines), device, open_runner)
        return 0
    with open_runner() as runner:
        if arguments.input_file:
            num_errors = run_batch(runner, lines, arguments.output_file)
            print(summary(len(lines), arguments.output_file), file=sys.stderr)
            return EXIT_SOME_FAILED if num_errors else 0
        if arguments.chat:
            num_refused = chat(runner, request, map(picture_source, arguments.image))
            return EXIT_SOME_FAILED if num_refused and not sys.stdin.isatty() else 0
        if arguments.show_tiles:
            shown = Ticket(request)
            runner.prepare(shown)
            write_tiles(shown.images, arguments.show_tiles)
        with loading_on(device, runner.engine, "answering"):
            result = stream(runner, request) if arguments.streaming else runner.generate(request)
    if arguments.json:
        print(json.dumps(answer_json(result), ensure_ascii=False))
    elif not arguments.streaming:
        print(*(choice.text for choice in result.choices), sep="\n")
    return EXIT_SOME_FAILED if warn_if_cut(request, result) else 0


def _parse() -> Program:
    arguments = parser().parse_args()
    _check_flags(arguments)
    if arguments.max_image_pixels is not None:
        set_most_pixels(arguments.max_image_pixels)
    is_one = arguments.compare is None and not (arguments.input_file or arguments.chat)
    options = engine_options(
        arguments,
        gather_logits=arguments.compare is not None,
        num_answers=(arguments.n or 1) if is_one else None,
    )
    return Program(arguments.engine_dir, arguments.device, options, partial(lead, arguments))


def main() -> int:
    return launch(os.environ, _parse)


if __name__ == "__main__":
    run(main, rank=rank_from(os.environ), end=end)
