"""The torch executor on a GPU against itself on a CPU, over the same engine directory."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm.planning import hopper
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderExecutor, DecoderOptions, DecoderRequest
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.kv_blocks import count_blocks
from runtime.decoder.models.open_model import open_model
from runtime.decoder.sampler import sample_rows
from runtime.decoder.scheduler import max_num_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on
from runtime.requests.sampling import SamplingParams
from tests.conftest import CPU
from tests.support.decoding import generate
from tests.support.tolerances import FAST_PATH_GAP, FAST_PATH_LOGITS, gap_to_best, relative_error

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a Hopper GPU",
    ),
]
CUDA = torch.device("cuda")
VOCAB_SIZE = 512


def load(engine_dir: Path, device: torch.device, **limits: int) -> TorchDecoderExecutor:
    engine = EngineDir.read(engine_dir)
    engine = replace(engine, limits=replace(engine.limits, **limits))
    return TorchDecoderExecutor.load(engine, device)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 90))] for _ in range(count)]


def logits_along(
    executor: DecoderExecutor, prompt: list[int], answer: list[int]
) -> list[torch.Tensor]:
    """Logits of every token of a given answer, each computed as a prompt of its own."""
    found = []
    for count in range(len(answer)):
        executor.submit(DecoderRequest(prompt + answer[:count], 1, return_logits=True))
        logits = executor.step()[0].logits
        assert logits is not None
        found.append(logits.cpu())
    return found


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_the_fast_path_is_taken(self, engine_dir: Path) -> None:
        assert isinstance(open_model(EngineDir.read(engine_dir), CUDA).model, HopperModel)

    def test_logits_are_the_cpus(self, engine_dir: Path) -> None:
        ours, oracle = load(engine_dir, CUDA), load(engine_dir, CPU)
        for prompt in prompts(6):
            ((answer, _),) = generate(oracle, [DecoderRequest(prompt, 12)])
            wanted, found = (logits_along(each, prompt, answer) for each in (oracle, ours))
            error = relative_error(torch.stack(found), torch.stack(wanted))
            gaps = [gap_to_best(int(a.argmax()), b) for a, b in zip(found, wanted, strict=True)]
            print(f"error {error:.4f}, largest gap {max(gaps):.3f}")
            assert error < FAST_PATH_LOGITS
            assert max(gaps) < FAST_PATH_GAP

    def test_decoding_and_prompts_agree_across_blocks(self, engine_dir: Path) -> None:
        executor = load(engine_dir, CUDA, max_seq_len=256, max_input_len=200)
        for prompt in prompts(6):
            executor.submit(DecoderRequest(prompt, 40, return_logits=True))
            outputs = [output for _ in range(40) for output in executor.step()]
            decoded = torch.stack([output.logits.cpu() for output in outputs])  # type: ignore[union-attr]
            answer = [output.token_id for output in outputs]
            read = torch.stack(logits_along(executor, prompt, answer))  # type: ignore[arg-type]
            assert relative_error(read, decoded) < FAST_PATH_LOGITS

    @pytest.mark.parametrize("limits", [{}, {"max_num_tokens": 33}], ids=["whole", "chunks"])
    def test_answers_of_a_batch_are_the_cpus_up_to_ties(
        self, engine_dir: Path, limits: dict[str, int]
    ) -> None:
        """A tie that falls otherwise changes all that follows, so the first tokens decide."""
        requests = [DecoderRequest(prompt, 8) for prompt in prompts(24)]
        found = generate(load(engine_dir, CUDA, max_batch_size=8, **limits), requests)
        oracle = load(engine_dir, CPU)
        for request, (answer, _) in zip(requests, found, strict=True):
            (logits,) = logits_along(oracle, request.token_ids, answer[:1])
            assert gap_to_best(answer[0], logits) < FAST_PATH_GAP

    def test_draws_are_the_cpus(self) -> None:
        logits = 3 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
        params = [
            SamplingParams(),
            SamplingParams(0.7, 0, 1.0, 1),
            SamplingParams(1.0, 20, 0.9, 2),
            SamplingParams(1.3, 0, 0.5, 3),
        ] * 10
        steps = list(range(40))
        found = sample_rows(logits.cuda(), params, steps)
        assert found.tolist() == sample_rows(logits, params, steps).tolist()


class TestShortOfMemory:
    """These take the whole GPU: nothing else may run on it (gpu_check.sh runs them alone)."""

    pytestmark = needs_gpu

    def test_alone_a_gpu_that_is_taken_is_reported_and_the_engine_loads_once_it_is_free(
        self, engine_dir: Path
    ) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(CUDA)
        taken = torch.empty(free - (100 << 20), dtype=torch.uint8, device=CUDA)
        with pytest.raises(UserError, match=r"needs .* GB of cuda, where 0\.. GB are free"):
            load(engine_dir, CUDA, max_num_tokens=1 << 20)
        del taken
        torch.cuda.empty_cache()
        assert generate(load(engine_dir, CUDA), [DecoderRequest([1, 2, 3], 4)])[0][1] == "length"

    def test_alone_running_out_while_loading_is_one_line(
        self, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where another program takes the memory after it was counted."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(CUDA)
        taken = torch.empty(free - (30 << 20), dtype=torch.uint8, device=CUDA)
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
            with pytest.raises(UserError, match="ran out of memory on cuda while loading"):
                load(engine_dir, CUDA, max_batch_size=256, max_num_tokens=8192)
        del taken
        torch.cuda.empty_cache()
        assert len(generate(load(engine_dir, CUDA), [DecoderRequest([1, 2, 3], 4)])) == 1

    def test_requests_wait_for_blocks_and_are_answered_in_full(self, engine_dir: Path) -> None:
        engine = EngineDir.read(engine_dir)
        limits = replace(engine.limits, max_batch_size=8, max_seq_len=256, max_input_len=200)
        opened = open_model(replace(engine, limits=limits), CUDA)
        requests = [DecoderRequest(prompt, 100) for prompt in prompts(12)]
        whole = TorchDecoderExecutor.over(replace(engine, limits=limits), opened)
        expected = generate(whole, requests)
        short = TorchDecoderExecutor(engine.checkpoint_config, limits, opened.model, 12)
        cancelled = short.submit(requests[0])
        short.step()
        short.cancel(cancelled)
        found = generate(short, requests)
        assert short.scheduler.num_preemptions > 0
        assert short.scheduler.num_free_blocks == 12
        assert [len(ids) for ids, _ in found] == [len(ids) for ids, _ in expected]
        oracle = load(engine_dir, CPU)
        for request, (answer, _) in zip(requests, found, strict=True):
            (logits,) = logits_along(oracle, request.token_ids, answer[:1])
            assert gap_to_best(answer[0], logits) < FAST_PATH_GAP


def test_an_engine_that_does_not_fit_is_refused_with_what_would_fit(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20_000_000, 80 << 30))
    monkeypatch.setattr(
        "runtime.decoder.models.kv_blocks.total_memory_bytes", lambda device: 80 << 30
    )
    with pytest.raises(UserError, match=r"needs .* GB of cuda, where 0.0 GB are free: weights"):
        open_model(EngineDir.read(engine_dir), CUDA)


def test_the_fraction_of_free_memory_is_what_the_kv_cache_takes(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fraction is of what is free after loading; without one, all that the limits can use."""
    engine = EngineDir.read(engine_dir)
    monkeypatch.setattr(hopper, "has_kernels", lambda device: True)
    monkeypatch.setattr(
        "runtime.decoder.models.kv_blocks.total_memory_bytes", lambda device: 80 << 30
    )

    def blocks(free_bytes: int, fraction: float | None = None) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 80 << 30))
        return count_blocks(engine, CUDA, cache_fraction=fraction)

    most = max_num_blocks(engine.limits)
    assert blocks(70 << 30) == most
    assert blocks(70 << 30, 0.9) == most, "a fraction is no more than what is needed"
    none, all_of_it = 0, 70 << 30
    while none + 1 < all_of_it:  # the least that is enough for all
        middle = (none + all_of_it) // 2
        try:
            is_enough = blocks(middle) == most
        except UserError:
            is_enough = False
        none, all_of_it = (none, middle) if is_enough else (middle, all_of_it)
    half, third = blocks(all_of_it, 0.5), blocks(all_of_it, 0.3)
    assert (half, third) == (most // 2, int(0.3 * most))
    with pytest.raises(UserError, match=r"fraction 0.001 leaves 0.0 GB .*; raise it"):
        blocks(all_of_it, 0.001)


def test_the_fraction_on_a_cpu_is_refused(engine_dir: Path) -> None:
    options = DecoderOptions(kv_cache_free_gpu_memory_fraction=0.5)
    with pytest.raises(UserError, match=r"fraction 0.5 is of a GPU's memory, .* runs on a CPU"):
        TorchDecoderExecutor.load(EngineDir.read(engine_dir), CPU, options)


def test_a_machine_without_a_compiler_is_reported_with_what_to_install(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton says "Failed to find C compiler" there."""
    build = pytest.importorskip("triton.runtime.build", reason="triton is not installed")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    engine = EngineDir.read(engine_dir)
    with (
        pytest.raises(UserError, match=r"C compiler and Python's headers .* gcc python3-dev"),
        loading_on(CUDA, engine),
    ):
        build._build("launcher", "launcher.c", ".", [], [], [], [])
    with pytest.raises(RuntimeError, match="of ours"), loading_on(CUDA, engine):
        raise RuntimeError("of ours")
