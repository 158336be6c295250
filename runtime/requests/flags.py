"""The command-line flags that every request shares, for all programs that ask an engine."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from nvlm.inputs.prompt import DEFAULT_SYSTEM, PromptFormat
from nvlm.program.command_line import ArgumentParser, positive_int
from nvlm.program.errors import UserError
from runtime.requests.guide import GUIDE_KINDS, GUIDES, MAX_GUIDE_BYTES, given_guide
from runtime.requests.sampling import SETTINGS, SamplingParams, given_settings, with_sampling
from runtime.requests.types import GenerationRequest


def add_request_flags(
    parser: ArgumentParser, *, prompt_format: PromptFormat, max_new_tokens: int
) -> None:
    """Adds the groups "prompt and answer" and "sampling". The last two arguments are the program's
    own defaults."""
    add = parser.add_argument_group("prompt and answer").add_argument
    add("--system", action="once", default=DEFAULT_SYSTEM, help="system message")
    add(
        "--prompt_format",
        choices=("hf", "megatron"),
        default=prompt_format,
        help="chat template: Hugging Face's or Megatron-LM's",
    )
    add(
        "--max_new_tokens",
        type=positive_int,
        default=max_new_tokens,
        metavar="N",
        help="longest answer, in tokens; it ends sooner where the engine's max_seq_len is reached",
    )
    add(
        "--max_num_tiles",
        type=positive_int,
        metavar="N",
        help="most tiles of an image's grid, without the thumbnail (default: the model's)",
    )
    add("--stop", nargs="+", default=[], help="strings that end the answer")
    add = parser.add_argument_group("sampling", "What is not given is off.").add_argument
    for setting in SETTINGS:
        add(f"--{setting.name}", **setting.flag)


def add_guide_flags(parser: ArgumentParser) -> None:
    """Adds the group "guided answers": what the answer must match."""
    add = parser.add_argument_group("guided answers", "Give one of these at most.").add_argument
    keywords: dict[str, dict[str, Any]] = {
        "json_schema": {"type": _schema, "metavar": "FILE"},
        "json_object": {"action": "store_true", "default": None},
        "choice": {"nargs": "+"},
        "grammar": {"type": _grammar, "metavar": "FILE"},
    }
    for kind in GUIDES:
        add(f"--{kind.name}", help=kind.help, **keywords.get(kind.name, {}))


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
        guide=given_guide(given),
    )


_WITHOUT_FILE = {"json_schema": ", which begins with {", "grammar": ", which has a rule start:"}
"""How a guide that stands in the flag itself is known."""


def _schema(value: str) -> str:
    """The schema itself begins with a brace."""
    return value if value.lstrip().startswith("{") else _read_guide("json_schema", value)


def _grammar(value: str) -> str:
    """The grammar itself has a rule `start`."""
    return value if "start:" in value else _read_guide("grammar", value)


def _read_guide(name: Literal["json_schema", "grammar"], path: str) -> str:
    try:
        with open(path, "rb") as file:
            # One byte more than fits is enough to refuse what does not, also within a character.
            found = file.read(MAX_GUIDE_BYTES + 1)
            return found.decode(errors="strict" if len(found) <= MAX_GUIDE_BYTES else "replace")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--{name} {path} cannot be read ({error}); give {GUIDE_KINDS[name].expected}, in "
            f"a file or as it is{_WITHOUT_FILE[name]}"
        ) from None
