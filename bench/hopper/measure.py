"""Phases of the product on a GPU, each beside the device's ceilings of the same run.

    python -m bench.hopper decode settings prefill first_token serving interactive vision
        [--shape 72b] [--layers 8,16] [--batch_sizes 1,8,64] [--context 2048] [--prompts 1948,2048]
        [--requests 256] [--answer 128] [--serving 2048/128/256/64] [--picture_rate 0,1,2]
        [--max_step_ms 0,30] [--seconds 15] [--tiles 7] [--precisions bfloat16,FP8]
        [--profile FILE] [--output FILE]

The product's loader loads a synthetic engine (bench/synthetic_engine.py) for each number
of layers. bench/hopper/phases.py says what each phase is; bench/ranks measures the same on several
GPUs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os

from bench.ceilings import measure_ceilings
from bench.hopper.device import device_for
from bench.hopper.parts import OneDevice
from bench.hopper.phases import add_flags, measure, parse
from bench.machine import describe, describe_gpu
from bench.report import Report
from nvlm.program.process import set_up_cublas


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_flags(parser, layers="8,16")
    options = parse(parser, arguments)
    set_up_cublas(os.environ)
    device = device_for(options.shape, parser)
    ceilings = measure_ceilings(device)
    report = Report(describe() | describe_gpu(device), ceilings, output=options.output)
    measure(options, OneDevice(device, use_graphs=not options.no_graphs), ceilings, report)
    print(json.dumps(report.to_json()))


if __name__ == "__main__":
    main()
