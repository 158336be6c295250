"""How long one piece of work may take on the slowest machine that is worth running it on.

Beyond that it hangs. The rates are far below those of any machine that is worth it, so that a busy
or swapping one is never taken for dead; what waits for the limit is a hang alone, since dead
processes and threads are seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.config import VisionConfig
from nvlm.planning.memory_plan import (
    decoder_parameter_count,
    decoder_weight_bytes,
    vision_parameter_count,
)

LEAST_S = 60.0  # for what no plan counts: a scheduler that gives others the CPU, a compiled kernel
_CPU_FLOPS_PER_S = 0.5e9  # a core that many programs share multiplies one row faster
_GPU_FLOPS_PER_S = 20e12  # an H200 is 60 times as fast (bench/results/hopper_h200_rooms.json)
_DISK_BYTES_PER_S = 100e6  # mapped weights that the system dropped are read again


@dataclass(frozen=True, slots=True)
class StepLimit:
    """How long a step may take before it counts as hung."""

    num_parameters: int  # each is multiplied once a token
    num_bytes: int  # weights that may have to be read from the disk first; 0 where a GPU has them
    flops_per_s: float  # the least that the device is taken to do

    def seconds(self, num_tokens: int) -> float:
        flops = 2 * self.num_parameters * num_tokens
        return LEAST_S + self.num_bytes / _DISK_BYTES_PER_S + flops / self.flops_per_s


def decoder_step_limit(config: CheckpointConfig, device: torch.device) -> StepLimit:
    """The limit of a decoder step, by the number of tokens that it computes. Ranks share a CPU."""
    if device.type == "cuda":
        return StepLimit(decoder_parameter_count(config), 0, _GPU_FLOPS_PER_S)
    num_parameters = config.world_size * decoder_parameter_count(config)
    num_bytes = config.world_size * decoder_weight_bytes(config)
    return StepLimit(num_parameters, num_bytes, _CPU_FLOPS_PER_S)


def vision_limit(config: VisionConfig, device: torch.device) -> StepLimit:
    """The limit of encoding tiles, by their number of positions."""
    num_parameters = vision_parameter_count(config)
    if device.type == "cuda":
        return StepLimit(num_parameters, 0, _GPU_FLOPS_PER_S)
    return StepLimit(num_parameters, 4 * num_parameters, _CPU_FLOPS_PER_S)
