"""A benchmark over a Ray cluster: each worker answers a share, then all are scored.

    ray job submit --working-dir . -- python examples/ray_shares.py --num_shares 32 \
        --engine_dir /fast/engine --task ChartQA --input_image_path /data/chartqa/png \
        --gt_path /data/chartqa/test_human.json --output_path /results/fp8

The other flags are those of `evaluate.py generate`. Every machine needs the environment, the
engine, the data and --output_path at the same paths. Run again with as many shares, it resumes
with what is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import ray

PROGRAM = str(Path(__file__).resolve().parents[1] / "evaluate.py")


@ray.remote(max_retries=3)  # a machine that went away: another resumes its share
def answer(flags: list[str], share: int, num_shares: int) -> int:
    """The exit code of `evaluate.py generate`."""
    own = ["--num_partitions", str(num_shares), "--partition_id", str(share)]
    return subprocess.run(
        [sys.executable, PROGRAM, "generate", *flags, *own], check=False
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_shares", type=int, required=True)
    parser.add_argument("--gpus_per_share", type=float, default=1)
    parser.add_argument("--cpus_per_share", type=float, default=1)
    parser.add_argument("--output_path", required=True)
    arguments, flags = parser.parse_known_args()
    flags += ["--output_path", arguments.output_path]
    ray.init()
    task = answer.options(num_gpus=arguments.gpus_per_share, num_cpus=arguments.cpus_per_share)
    shares = range(arguments.num_shares)
    codes = ray.get([task.remote(flags, share, arguments.num_shares) for share in shares])
    score = [sys.executable, PROGRAM, "score", "--input_path", arguments.output_path]
    return max(*codes, subprocess.run(score, check=False).returncode)


if __name__ == "__main__":
    sys.exit(main())
