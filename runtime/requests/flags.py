"""The command-line flags that every request shares, for all programs that ask an engine."""

from __future__ import annotations

import argparse

from nvlm.inputs.prompt import DEFAULT_SYSTEM, PromptFormat
from nvlm.program.command_line import ArgumentParser, positive_int
from runtime.requests.sampling import SETTINGS, SamplingParams, given_settings, with_sampling
from runtime.requests.types import GenerationRequest


def add_request_flags(
    parser: ArgumentParser, *, prompt_format: PromptFormat, max_new_tokens: int
) -> None:
    """The last two are the program's own defaults."""
    add = parser.add_argument
    add("--system", action="once", default=DEFAULT_SYSTEM, help="system message")
    add("--prompt_format", choices=("hf", "megatron"), default=prompt_format, help="template")
    add("--max_new_tokens", type=positive_int, default=max_new_tokens, help="length of an answer")
    add("--max_num_tiles", type=positive_int, help="tiles of an image's grid, at most")
    for setting in SETTINGS:
        add(f"--{setting.name}", **setting.flag)
    add("--stop", nargs="+", default=[], help="strings that end the answer")


def request_of(arguments: argparse.Namespace) -> GenerationRequest:
    """The flags as a request that asks nothing yet."""
    given = vars(arguments)
    return GenerationRequest(
        content=(),
        system=given["system"],
        prompt_format=given["prompt_format"],
        max_new_tokens=given["max_new_tokens"],
        max_num_tiles=given["max_num_tiles"],
        stop=tuple(given["stop"]),
        sampling=with_sampling(SamplingParams(), given_settings(given)),
    )
