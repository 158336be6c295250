"""One rank of a test's job: the fast path's plain forms over gloo, running ahead and not.

    rank_ahead.py <engine of all ranks> <number of requests> <folder of results>

The leader plays the same random requests both ways and writes found.json: the answers of each, and
how many steps there were of each kind.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nvlm.program import command_line
from nvlm.program.launcher import World, end, rank_from
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.kernels.operands import KVPages
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import CollectiveAllReduceNorm
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.models.torch_weights import open_weights
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.ranks.mpi import Job
from runtime.ranks.open_parts import open_engine_on_ranks
from runtime.ranks.parallel_decoder import ParallelAheadModel, parallel_model
from runtime.ranks.process_group import ProcessGroup
from runtime.requests.sampling import SamplingParams

CPU = torch.device("cpu")
BATCH_SIZE, MAX_SEQ_LEN, MAX_NUM_TOKENS = 4, 96, 40
NUM_BLOCKS = 5  # fewer than the batch can fill
ROWS = 20


class RowByRow(PlainForms):
    """Every row's bits are its own, whatever shares a step with it: which requests share one
    depends on when it is scheduled, and a rounding may turn a nearly even choice."""

    def linear(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        wide = replace(linear, weight=linear.weight.to(torch.float32))
        rows = [super(RowByRow, self).linear(row, wide, dtype) for row in x.split(1)]
        return torch.cat(rows) if out is None else out.copy_(torch.cat(rows))

    @staticmethod
    def _attended(
        q: torch.Tensor,
        pages: KVPages,
        blocks: torch.Tensor,
        first_position: int,
        scale: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = [
            PlainForms._attended(row, pages, blocks, position, scale, None)
            for position, row in enumerate(q.split(1), start=first_position)
        ]
        found = torch.cat([row.view(torch.uint8) for row in rows])
        return found.view(rows[0].dtype) if out is None else out.copy_(found.view(rows[0].dtype))

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.to(torch.float32)
        return torch.cat([super(RowByRow, self).head(row, wide) for row in x.split(1)])


class Counting:
    """`DecoderModel` that counts its steps and hides that the model can run ahead."""

    def __init__(self, model: ParallelAheadModel) -> None:
        self._model = model
        self.num_steps = self.num_steps_ahead = self.num_prompts_ahead = 0

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        self.num_steps += 1
        return self._model.forward(steps)

    def close(self) -> None:
        self._model.close()


class CountingAhead(Counting):
    """`AheadModel`."""

    @property
    def max_rows_ahead(self) -> int:
        return self._model.max_rows_ahead

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        self.num_steps_ahead += 1
        self.num_prompts_ahead += any(len(step.token_ids) > 1 for step in steps)
        return self._model.forward_ahead(steps, token_ids)


def open_on_ranks(engine: EngineDir, group: ProcessGroup) -> ParallelAheadModel:
    config, rank = engine.checkpoint_config, group.rank
    weights = load_hopper_weights(open_weights(engine.directory / "llm", config, rank), config, CPU)
    forms = RowByRow()
    sums = CollectiveAllReduceNorm(forms, group.all_reduce)
    sizes = BATCH_SIZE, MAX_SEQ_LEN, weights, NUM_BLOCKS, CPU, forms
    own = HopperModel(config, *sizes, all_reduce_norm=sums)
    model = parallel_model(own, group, config.decoder.vocab_size)
    assert isinstance(model, ParallelAheadModel)
    return model


def random_request(rng: random.Random, vocab_size: int, hidden_size: int) -> DecoderRequest:
    """A third with a picture of its own; a third sampled; some stop words end answers early."""
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 30))]
    request = DecoderRequest(prompt, rng.randint(1, 40))
    if rng.random() < 0.3:
        table = torch.randn(ROWS, hidden_size, generator=torch.Generator().manual_seed(len(prompt)))
        prompt += range(vocab_size, vocab_size + ROWS)
        request = replace(request, prompt_table=table)
    if rng.random() < 0.3:
        request = replace(request, sampling=SamplingParams(0.9, 50, 0.9, rng.randrange(1000)))
    if rng.random() < 0.3:
        request = replace(request, stop_ids=frozenset(rng.sample(range(vocab_size), 60)))
    return request


def play(engine: EngineDir, model: Counting, requests: list[DecoderRequest]) -> dict[str, object]:
    """Requests join between steps, so that some come while a step is in flight; every seventh is
    cancelled at its third token."""
    rng = random.Random(3)
    executor = TorchDecoderExecutor(engine.checkpoint_config, engine.limits, model, NUM_BLOCKS)
    answers: list[list[int]] = [[] for _ in requests]
    index_of: dict[int, int] = {}
    waiting = list(range(len(requests)))
    while True:
        while waiting and rng.random() < 0.3:
            index = waiting.pop(0)
            index_of[executor.submit(requests[index])] = index
        outputs = executor.step()
        if not outputs and not waiting:
            break
        for output in outputs:
            index = index_of[output.request_id]
            if output.token_id is not None:
                answers[index].append(output.token_id)
            if index % 7 == 6 and len(answers[index]) == 3:
                executor.cancel(output.request_id)
    assert executor.scheduler.num_free_blocks == NUM_BLOCKS
    return {
        "answers": answers,
        "num_steps": model.num_steps,
        "num_steps_ahead": model.num_steps_ahead,
        "num_prompts_ahead": model.num_prompts_ahead,
        "num_preemptions": executor.scheduler.num_preemptions,
    }


def main() -> None:
    directory, num_requests, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    with Job(World.from_environment(os.environ)) as job, torch.inference_mode():
        engine = open_engine_on_ranks(directory, CPU, job)
        limits = replace(
            engine.limits,
            max_batch_size=BATCH_SIZE,
            max_seq_len=MAX_SEQ_LEN,
            max_num_tokens=MAX_NUM_TOKENS,
        )
        engine = replace(engine, limits=limits)
        group = ProcessGroup(job, CPU)
        model = open_on_ranks(engine, group)
        if group.rank > 0:
            group.follow()
            return
        decoder = engine.checkpoint_config.decoder
        rng = random.Random(5)
        sizes = decoder.vocab_size, decoder.hidden_size
        requests = [random_request(rng, *sizes) for _ in range(num_requests)]
        found = {
            "waiting": play(engine, Counting(model), requests),
            "ahead": play(engine, CountingAhead(model), requests),
        }
        model.close()
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    command_line.run(main, rank=rank_from(os.environ), end=end)
