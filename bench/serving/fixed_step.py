"""serve.py with a decoder whose step takes a fixed time, whatever the machine does beside it.

python -m bench.serving.fixed_step --step_ms 50 --engine_dir D ...
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.serving.http import InstantDecoder
from frontends.openai.flags import parser
from frontends.openai.main import lead
from nvlm.program.command_line import ArgumentParser, run
from runtime.decoder.executor import DecoderOptions
from runtime.serving.launch import Program, launch
from runtime.serving.runner import Runner


def main() -> int:
    logging.getLogger("frontends").setLevel(logging.INFO)
    own = ArgumentParser((__doc__ or "").partition("\n")[0])
    own.add_argument("--step_ms", type=float, required=True)
    given, flags = own.parse_known_args(sys.argv[1:])
    arguments = parser().parse_args(flags)
    led = partial(_lead, arguments, given.step_ms / 1e3)
    return launch({}, lambda: Program(arguments.engine_dir, "cpu", DecoderOptions(), led))


def _lead(
    arguments: argparse.Namespace,
    step_s: float,
    device: torch.device,
    open_runner: Callable[[], Runner],
) -> int:
    def opened() -> Runner:
        runner = open_runner()
        runner.decoder.close()
        token_id = runner.tokenizer.encode("x")[0]
        runner.decoder = InstantDecoder(runner.engine.limits, token_id, step_s)
        return runner

    return lead(arguments, device, opened)


if __name__ == "__main__":
    run(main)
