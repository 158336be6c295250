"""Where a measurement runs."""

from __future__ import annotations

import argparse

import torch


def device_for(shape: str, parser: argparse.ArgumentParser) -> torch.device:
    """The GPU, or the CPU where there is none, which takes small shapes alone."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if shape == "72b":
        parser.error(
            "--shape 72b needs a GPU, and torch sees none; give --shape tiny --layers 2, which a "
            "CPU computes in a moment"
        )
    return torch.device("cpu")
