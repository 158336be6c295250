"""Prompts bounded by time, on a simulated clock: a model of step times in, gaps between tokens and
waits for first tokens out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import run
from frontends.openai import flags
from frontends.triton import serve
from nvlm.planning.hopper import CHUNK_SIZES
from nvlm.planning.limits import EngineLimits
from nvlm.program.command_line import ArgumentParser
from nvlm.program.errors import UserError
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.executor import DecoderOptions, DecoderRequest, create_decoder_executor
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.scheduler import Scheduler, Sequence, max_num_blocks
from runtime.decoder.step_bound import StepBound
from runtime.decoder.step_times import CONTEXT, measure_step_bound, steps_of
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from tests.support.decoding import generate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LIMITS = EngineLimits(
    max_batch_size=16,
    max_input_len=4096,
    max_seq_len=4608,
    max_num_tokens=8192,
    max_num_images=1,
    max_multimodal_len=0,
)
SIZES = [*CHUNK_SIZES, *(512 * 2**i for i in range(5))]

Times = Callable[[int, int], float]
"""Rows that decode and prompt tokens to milliseconds."""


def h200(num_rows: int, num_tokens: int) -> float:
    """Roughly 80 layers in FP8: weights are read, or products are computed."""
    decode_ms = 19.0 + 0.14 * num_rows
    return max(decode_ms, 8.0 + 0.11 * (num_tokens + num_rows)) if num_tokens else decode_ms


def bound_of(times: Times, max_ms: float, rows: tuple[int, ...] = (1, 8, 15)) -> StepBound:
    curves = {n: [(size, times(n, size)) for size in SIZES] for n in rows}
    return StepBound.of(max_ms, curves)


@dataclass(eq=False)
class Request:
    sequence: Sequence
    arrived: float
    times: list[float] = field(default_factory=list)  # of its tokens

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Simulation:
    """Steps a scheduler, each for as long as `times` says."""

    def __init__(self, times: Times, bound: StepBound | None, **limits: int) -> None:
        limits_ = replace(LIMITS, **limits)
        self.scheduler = Scheduler(limits_, max_num_blocks(limits_), bound)
        self.now = 0.0
        self.steps: list[list[tuple[int, int]]] = []  # (id, tokens) of each
        self.durations: list[float] = []
        self._times = times
        self._requests: list[Request] = []

    def ask(self, num_prompt_tokens: int, max_new_tokens: int) -> Request:
        number = len(self._requests)
        prompt = [10_000 * number + i for i in range(num_prompt_tokens)]
        total = num_prompt_tokens + max_new_tokens
        sequence = Sequence(number, DecoderRequest(prompt, max_new_tokens), total, list(prompt))
        self.scheduler.add(sequence)
        self._requests.append(Request(sequence, self.now))
        return self._requests[-1]

    def step(self) -> bool:
        scheduled = self.scheduler.schedule()
        counts = [each.num_scheduled for each in scheduled]
        num_rows = counts.count(1)
        duration = self._times(num_rows, sum(counts) - num_rows)
        self.now += duration
        self.steps.append([(each.request_id, each.num_scheduled) for each in scheduled])
        self.durations.append(duration)
        drawing = [each for each in scheduled if each.is_last_chunk]
        self.scheduler.advance(scheduled)
        for sequence in drawing:
            sequence.token_ids.append(7)
            self._requests[sequence.request_id].times.append(self.now)
            if sequence.is_complete:
                self.scheduler.finish(sequence)
        return bool(scheduled)


def pictures_arrive(bound: StepBound | None, every_ms: float) -> tuple[list[Request], list[float]]:
    """Eight decode for a while, one prompt of 1,948 tokens comes every so often; the eight, and the
    waits for the pictures' first tokens."""
    simulation = Simulation(h200, bound)
    texts = [simulation.ask(64, 1500) for _ in range(8)]
    while not all(text.times for text in texts):
        simulation.step()
    pictures: list[Request] = []
    begin, due = simulation.now, simulation.now
    while simulation.now < begin + 20_000:
        if simulation.now >= due:
            pictures.append(simulation.ask(1948, 8))
            due += every_ms
        simulation.step()
    waits = [each.times[0] - each.arrived for each in pictures if each.times]
    assert len(waits) >= len(pictures) - 3, "prompts come to an end"
    return texts, waits


@pytest.mark.parametrize("every_ms", [1000.0, 500.0])
def test_answers_continue_within_the_bound_while_pictures_come(every_ms: float) -> None:
    texts, waits = pictures_arrive(bound_of(h200, 30.0), every_ms)
    assert max(max(text.gaps) for text in texts) <= 30.0
    assert sorted(waits)[len(waits) // 2] < 400.0, "a prompt takes most of each step"
    unbounded, _ = pictures_arrive(None, every_ms)
    assert max(max(text.gaps) for text in unbounded) > 200.0


def test_prompts_are_whole_while_nobody_decodes() -> None:
    simulation = Simulation(h200, bound_of(h200, 30.0))
    simulation.ask(1948, 4)
    simulation.step()
    assert simulation.steps == [[(0, 1948)]]


def test_a_bound_below_every_step_lets_prompts_take_what_costs_hardly_more() -> None:
    simulation = Simulation(h200, bound_of(h200, 1.0))
    text = simulation.ask(10, 300)
    simulation.step()
    prompt = simulation.ask(640, 4)
    while not prompt.times:
        simulation.step()
    assert [dict(step).get(1) for step in simulation.steps[1:]] == [96] * 6 + [64]
    assert len(text.times) == 8, "and stop nobody"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    max_ms=st.floats(21.0, 200.0),
    fixed_ms=st.floats(0.5, 12.0),
    row_ms=st.floats(0.0, 0.3),
    token_ms=st.floats(0.02, 0.5),
    weights_ms=st.floats(1.0, 15.0),
)
def test_no_step_takes_longer_than_the_bound_and_all_prompts_end(
    seed: int, max_ms: float, fixed_ms: float, row_ms: float, token_ms: float, weights_ms: float
) -> None:
    """Whatever the machine's times, but where the fewest tokens alone take longer."""

    def times(num_rows: int, num_tokens: int) -> float:
        return fixed_ms + row_ms * num_rows + max(weights_ms, token_ms * num_tokens)

    rng = random.Random(seed)
    # A number of rows between those measured takes the time between theirs.
    simulation = Simulation(times, bound_of(times, max_ms, rows=tuple(range(1, 16))))
    asked: list[Request] = []
    for _ in range(30):
        if rng.random() < 0.5:
            asked.append(simulation.ask(rng.randint(2, 3000), rng.randint(1, 20)))
        simulation.step()
    while simulation.step():
        assert len(simulation.steps) < 20_000, "somebody starves"
    assert all(len(each.times) == each.sequence.request.max_new_tokens for each in asked)
    for step, duration in zip(simulation.steps, simulation.durations, strict=True):
        counts = [count for _, count in step]
        if 1 in counts:
            least = times(counts.count(1), CHUNK_SIZES[0])
            assert duration <= 1.01 * max(max_ms, 1.1 * least)


@pytest.mark.parametrize("seed", range(10))
def test_a_bound_that_no_step_reaches_changes_no_step(seed: int) -> None:
    """Neither does none, which is 0."""

    def steps(bound: StepBound | None) -> list[list[tuple[int, int]]]:
        rng = random.Random(seed)
        simulation = Simulation(h200, bound, max_num_tokens=rng.choice([40, 500, 8192]))
        for _ in range(60):
            if rng.random() < 0.4:
                simulation.ask(rng.randint(1, 900), rng.randint(1, 20))
            simulation.step()
        return simulation.steps

    assert steps(None) == steps(bound_of(h200, 1e9))


class TestStepBound:
    def test_sizes_of_graphs_as_many_as_fit_between_what_was_measured(self) -> None:
        bound = StepBound.of(30.0, {1: [(32, 20.0), (64, 20.0), (256, 25.0), (512, 45.0)]})
        assert bound.most_prompt_tokens(1) == 320

    def test_rows_between_those_measured_take_what_lies_between(self) -> None:
        bound = StepBound.of(30.0, {8: [(64, 10.0), (1024, 30.0)], 64: [(64, 10.0), (128, 30.0)]})
        found = [bound.most_prompt_tokens(rows) for rows in (1, 8, 36, 64, 200)]
        assert found == [1024, 1024, 576, 128, 128]

    def test_beyond_what_was_measured_the_slope_continues(self) -> None:
        assert StepBound.of(50.0, {1: [(64, 10.0), (128, 20.0)]}).most_prompt_tokens(1) == 320

    def test_the_fewest_tokens_are_the_least(self) -> None:
        assert StepBound.of(5.0, {1: [(64, 10.0), (128, 20.0)]}).most_prompt_tokens(9) == 64

    def test_where_the_fewest_take_too_long_so_many_come_as_take_hardly_longer(self) -> None:
        """Such steps cost what launching them costs, however few tokens are in them."""
        launched = [(64, 46.0), (128, 46.5), (256, 48.0), (512, 80.0)]
        assert StepBound.of(30.0, {8: launched}).most_prompt_tokens(8) == 256

    def test_more_tokens_never_take_less_time(self) -> None:
        noisy = StepBound.of(30.0, {1: [(32, 20.0), (64, 12.0), (128, 19.9), (256, 40.0)]})
        assert noisy.most_prompt_tokens(1) == 128 + 128 // 2

    def test_where_all_take_as_long_time_grows_with_the_tokens(self) -> None:
        assert StepBound.of(30.0, {1: [(32, 10.0), (64, 10.0)]}).most_prompt_tokens(1) == 192


class ClockedModel:
    """`DecoderModel` whose steps take what `times` says, on a clock of its own."""

    def __init__(self, times: Times) -> None:
        self.now, self._times = 0.0, times
        self.steps: list[list[SequenceStep]] = []

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        self.steps.append(steps)
        num_rows = sum(len(step.token_ids) == 1 for step in steps)
        self.now += self._times(num_rows, sum(len(step.token_ids) for step in steps) - num_rows)
        return torch.empty(0)

    def time_ms(self, work: Callable[[], object]) -> float:
        begun = self.now
        work()
        return self.now - begun

    def close(self) -> None: ...


class TestMeasuring:
    def measured(
        self, max_ms: float, times: Times = h200, **limits: int
    ) -> tuple[StepBound | None, ClockedModel]:
        chosen, model = replace(LIMITS, **limits), ClockedModel(times)
        num_blocks = max_num_blocks(chosen)
        found = measure_step_bound(model, chosen, num_blocks, max_ms, CPU, model.time_ms)
        return found, model

    def test_what_is_found_keeps_the_models_steps_within_the_bound(self) -> None:
        for max_ms in (25.0, 30.0, 60.0, 150.0):
            bound, _ = self.measured(max_ms)
            assert bound is not None
            for rows in (1, 8, 15):
                most = bound.most_prompt_tokens(rows)
                assert h200(rows, most) <= max_ms < h200(rows, most + 2 * TOKENS_PER_BLOCK)

    def test_steps_without_a_graph_that_take_too_long_are_not_chosen(self) -> None:
        """Above the largest graph, launching the kernels takes longer than what they compute."""

        def launched(num_rows: int, num_tokens: int) -> float:
            return max(h200(num_rows, num_tokens), 46.0 * (num_tokens > CHUNK_SIZES[-1]))

        for max_ms in range(30, 60):
            bound, _ = self.measured(max_ms, launched)
            assert bound is not None
            for rows in (1, 8, 15):
                assert launched(rows, bound.most_prompt_tokens(rows)) <= max_ms

    def test_it_ends_with_the_first_step_that_takes_too_long(self) -> None:
        _, model = self.measured(30.0)
        longest = max(sum(len(step.token_ids) for step in steps) for steps in model.steps)
        assert longest <= 2 * 256 + 15
        assert model.now < 2000, "milliseconds"

    def test_no_prompt_shares_a_step_in_a_batch_of_one(self) -> None:
        assert self.measured(30.0, max_batch_size=1)[0] is None

    @pytest.mark.parametrize("max_num_tokens", [20, 40, 8192])
    @pytest.mark.parametrize("max_seq_len", [40, 4608])
    @pytest.mark.parametrize("max_batch_size", [2, 5])
    def test_steps_are_those_that_a_scheduler_could_make(
        self, max_batch_size: int, max_seq_len: int, max_num_tokens: int
    ) -> None:
        limits = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
        _, model = self.measured(1e6, max_num_tokens=max_num_tokens, **limits)
        num_blocks = max_num_blocks(replace(LIMITS, **limits))
        fits = max_num_tokens > CHUNK_SIZES[0]
        fits &= max_seq_len >= CHUNK_SIZES[0] or max_batch_size > 2
        assert bool(model.steps) == fits
        for steps in model.steps:
            assert len(steps) <= max_batch_size
            assert sum(len(step.token_ids) for step in steps) <= max_num_tokens
            for step in steps:
                assert step.end_position <= max_seq_len
                assert TOKENS_PER_BLOCK * len(step.blocks) >= step.end_position
                assert len(set(step.blocks)) == len(step.blocks)
                assert set(step.blocks) <= set(range(num_blocks))

    def test_rows_read_blocks_of_their_own_after_a_context(self) -> None:
        steps = steps_of(8, 256, LIMITS, max_num_blocks(LIMITS))
        assert [step.first_position for step in steps] == [CONTEXT] * 8 + [CONTEXT - 256]
        blocks = [block for step in steps for block in step.blocks]
        assert len(set(blocks)) == len(blocks)

    def test_rows_of_a_step_differ(self) -> None:
        steps = steps_of(8, 96, LIMITS, max_num_blocks(LIMITS))
        tokens = [token for step in steps for token in step.token_ids]
        assert len(set(tokens)) == 8 + 96


@pytest.mark.parametrize(
    ("asked", "device", "ms"),
    [(0.0, CUDA, 0.0), (None, CUDA, 33.0), (None, CPU, 0.0), (12.5, CPU, 12.5)],
)
def test_a_service_on_a_gpu_has_a_bound_of_its_own(
    asked: float | None, device: torch.device, ms: float
) -> None:
    assert DecoderOptions(max_step_ms=asked).step_bound_ms(device) == ms
    assert DecoderOptions().step_bound_ms(device) == 0.0


@pytest.mark.parametrize("ms", [-1.0, math.nan, math.inf])
def test_a_bound_that_is_no_time_is_refused(ms: float) -> None:
    with pytest.raises(UserError, match=f"^max_step_ms is {ms:g}, expected milliseconds from 0"):
        DecoderOptions(max_step_ms=ms)


def test_an_engine_that_is_opened_with_a_bound_answers_as_without(engine_dir: Path) -> None:
    engine = EngineDir.read(engine_dir)
    rng = random.Random(2)
    requests = [
        DecoderRequest([rng.randrange(500) for _ in range(rng.randint(1, 100))], rng.randint(2, 20))
        for _ in range(20)
    ]
    bounded = TorchDecoderExecutor.load(engine, CPU, DecoderOptions(max_step_ms=0.001))
    found = generate(bounded, requests)
    assert found == generate(TorchDecoderExecutor.load(engine, CPU), requests)
    assert bounded.counts().num_tokens_beside > 0


def test_a_bound_is_made_while_nobody_asks(engine_dir: Path) -> None:
    executor = TorchDecoderExecutor.load(EngineDir.read(engine_dir), CPU)
    executor.submit(DecoderRequest([1, 2], 2))
    with pytest.raises(AssertionError, match="where nobody waits"):
        executor.bound_steps(5.0, CPU)


def test_a_decoder_that_schedules_by_itself_is_given_no_bound(engine_dir: Path) -> None:
    engine = replace(EngineDir.read(engine_dir), decoder_target="tensorrt_llm")
    with pytest.raises(UserError, match="--max_step_ms 9 needs decoder torch"):
        create_decoder_executor(engine, CPU, DecoderOptions(max_step_ms=9.0))


@pytest.mark.parametrize(
    ("make", "default"),
    [(run.parser, 0.0), (flags.parser, None), (serve.parser, None)],
    ids=["run.py", "serve.py", "Triton"],
)
def test_every_door_takes_the_bound_and_servers_have_one(
    make: Callable[[], ArgumentParser], default: float | None
) -> None:
    words = ["--engine_dir", "E"]
    assert make().parse_args(words).max_step_ms == default
    assert make().parse_args([*words, "--max_step_ms", "45"]).max_step_ms == 45.0
