"""Benchmarks: answers one with an engine directory, scores the answers and reports on them."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

from evaluation.asking import generate_command
from evaluation.reporting import score_command
from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError
from nvlm.program.launcher import end, rank_from
from runtime.serving.launch import Program, engine_options, launch

COMMANDS = {
    "generate": "answer a benchmark with an engine directory",
    "score": "score the answers, beside the model card's, and report on them",
}


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in (("generate", generate_command), ("score", score_command)):
        help_ = COMMANDS[name]
        sentence = f"{help_[0].upper()}{help_[1:]}."
        command.add_flags(commands.add_parser(name, description=sentence, help=help_))
    return parser


def _parse() -> argparse.Namespace:
    if not sys.argv[1:] or sys.argv[1] not in (*COMMANDS, "-h", "--help"):
        found = sys.argv[1] if sys.argv[1:] else "nothing"
        raise UserError(
            f"evaluate.py expected generate or score, found {found}; scores are `evaluate.py score "
            "--input_path PREFIX`, answers are `evaluate.py generate --task TASK`"
        )
    return parser().parse_args()


def _parse_generate() -> Program:
    arguments = _parse()
    generate_command.check_flags(arguments)
    lead = partial(generate_command.lead, arguments)
    return Program(arguments.engine_dir, arguments.device, engine_options(arguments), lead)


def main() -> int:
    if sys.argv[1:2] == ["score"]:
        return score_command.score(_parse())
    return launch(os.environ, _parse_generate)  # on several ranks one reports a mistake


if __name__ == "__main__":
    run(main, rank=rank_from(os.environ), end=end)
