"""The phases of bench.hopper on tensor parallel ranks, beside one of their GPUs.

    mpirun -n 2 python -m bench.ranks decode prefill first_token serving interactive
        [--one FILE] [--output FILE] [--layers 80] [--no_peer_memory]
        and the other flags of bench.hopper

Every rank makes its own random shards (bench/synthetic_engine.py), and encodes its part of the
tiles. `--one` names what bench.hopper kept (--output) or printed for one of these GPUs: rows bear
how many times as fast they are. Rates and shares are of one rank. --profile holds the leader's
kernels, whose sums over ranks include waiting for the others. `--output` is written after every
row, so that a hang loses only itself. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

from bench.ceilings import measure_ceilings
from bench.hopper.phases import add_flags, measure, parse
from bench.machine import describe, describe_gpu
from bench.ranks.parts import Ranks
from bench.report import Report, step_times
from nvlm.program.command_line import ArgumentParser
from nvlm.program.errors import UserError
from nvlm.program.launcher import World
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.ranks.mpi import Job
from runtime.ranks.process_group import ProcessGroup


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    add_flags(parser, layers="80")
    add = parser.add_argument
    add("--one", type=step_times, help="what bench.hopper kept or printed for one of these GPUs")
    add("--no_peer_memory", action="store_true", help="sums over ranks by NCCL")
    options = parse(parser, arguments)
    if len(options.layers) > 1:
        layers = ",".join(map(str, options.layers))
        raise UserError(f"--layers {layers}: ranks hold one decoder; give one number")
    return options


def main(arguments: list[str] | None = None) -> None:
    world = World.from_environment(os.environ)
    if world.size == 1:
        raise UserError("one rank is running; use mpirun -n 2, or bench.hopper for one GPU")
    set_up_cublas(os.environ)
    set_up_nccl(os.environ)
    with Job(world) as job:
        options = job.agree(lambda: options_of(arguments))
        device = job.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        group = ProcessGroup(job, device)
        ceilings = measure_ceilings(device)
        settings = {
            "use_graphs": not options.no_graphs,
            "use_peer_memory": not options.no_peer_memory,
        }
        parts = Ranks(group, **settings)
        if group.rank > 0:
            group.follow()
            return
        machine = describe() | describe_gpu(device) | {"tp_size": group.size, **settings}
        report = Report(machine, ceilings, output=options.output, one=options.one)
        measure(options, parts, ceilings, report)
        parts.close()
        print(json.dumps(report.to_json()))
