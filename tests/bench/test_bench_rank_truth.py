"""The programs that check several ranks find what is wrong, and run on the CPU's ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.ranks import ends
from bench.ranks.checksums import Checksums, checked_norms, checked_sum, checksum
from bench.ranks.ends import end_of
from bench.ranks.joining import guests
from bench.ranks.truth import NotAhead, same_tokens
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.step import AheadModel, DecoderModel
from runtime.requests.types import GenerationRequest
from tests.support.ranks import command, finished, needs_mpi

CPU = torch.device("cpu")
WEIGHTS = torch.randint(1 << 62, (64,), generator=torch.Generator().manual_seed(1)) | 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_checksum_sees_one_bit_and_where_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {int(checksum(x, WEIGHTS))}
    bits = x.view(torch.uint8)
    for row, column, bit in ((0, 0, 1), (4, 63, 128), (4, 62, 128), (3, 63, 128)):
        bits[row, column] ^= bit
        seen.add(int(checksum(x, WEIGHTS)))
        bits[row, column] ^= bit
    assert len(seen) == 5
    for row, column in ((0, 7), (1, 15)):
        bits[row, column] ^= 128
    seen.add(int(checksum(x, WEIGHTS)))
    assert len(seen) == 6, "two signs do not cancel"
    for row, column in ((0, 7), (1, 15)):
        bits[row, column] ^= 128
    assert int(checksum(x, WEIGHTS)) in seen
    assert int(checksum(x.flip(0), WEIGHTS)) not in seen, "rows have places"


class Adding:
    """An `AllReduceNorm` whose sum is off at its call number `wrong`."""

    def __init__(self, wrong: int) -> None:
        self._left = wrong

    def linear_add_rms_norm(
        self,
        x: torch.Tensor,
        linear: object,
        hidden: torch.Tensor,
        norm: object,
        scale: object,
        following: object = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._left -= 1
        total = hidden + x
        return total, total + (1 if self._left == 0 else 0)


def table(wrong: int, num_calls: int) -> torch.Tensor:
    checksums = Checksums(4, CPU)
    norm = checked_norms(lambda _: Adding(wrong), checksums)(PlainForms())
    for _ in range(num_calls):
        norm.linear_add_rms_norm(torch.ones(2, 8), None, torch.ones(2, 8), None, None)
    return checksums.table


def test_a_sum_that_differs_on_a_rank_is_seen_in_its_place_ever_after() -> None:
    """The sixth of sums whose step has four is a second one."""
    for num_calls in (6, 40):
        differs = table(6, num_calls) != table(0, num_calls)
        assert differs.flatten().tolist() == [False, True, False, False]


def test_plain_sums_are_checked_too() -> None:
    checksums = Checksums(1, CPU)
    add = checked_sum(lambda x: 2 * x, checksums)
    assert torch.equal(add(torch.ones(1, 3, 8)), torch.full((1, 3, 8), 2.0))
    assert checksums.table.item() != 0


def test_guests_are_the_same_every_time_and_some_leave() -> None:
    requests = [GenerationRequest.images_first(f"{i}") for i in range(5)]
    first, second = (guests(requests, 100, 20) for _ in range(2))
    described = [
        [(each.request, each.gap, each.leaves_after) for each in all_] for all_ in (first, second)
    ]
    assert described[0] == described[1]
    assert 10 < sum(each.leaves_after > 0 for each in first) < 50
    assert len({each.request.content for each in first}) == 5
    assert {each.request.sampling.temperature for each in first} == {0.0, 0.9}


def test_guests_who_heard_another_text_are_named() -> None:
    found, expected = (guests([GenerationRequest.images_first("?")], 40, 4) for _ in range(2))
    leaving = [i for i, each in enumerate(found) if each.leaves_after == 1]
    for i in leaving:
        found[i].pieces, expected[i].pieces = ["a", "b"], ["a"]
    assert same_tokens(found, expected) == {"num_answers": len(leaving), "different": []}
    found[leaving[1]].pieces = ["b"]
    assert same_tokens(found, expected)["different"] == [leaving[1]]


def test_a_model_that_is_not_ahead_does_not_look_as_if_it_were() -> None:
    methods = {name for name in vars(DecoderModel) if not name.startswith("_")}
    assert methods <= {*vars(NotAhead)}
    assert not isinstance(NotAhead.__new__(NotAhead), AheadModel)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.process
def test_two_ranks_answer_as_one_device(tmp_path: Path) -> None:
    words = ("-m", "bench.ranks.truth", "--folder", tmp_path, "--per_task", 1, "--steps", 12)
    result = finished(command(2, *words, "--device", "cpu"), tmp_path / "mark")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["as built, beside one"]["num_answers"] == 8
    assert found["as built, beside one"]["equal_share"] == 1.0
    counts = {"num_answers": 8, "num_equal_logits": 8}
    assert found["without graphs, beside as built"] == counts
    sums = {"num_steps": 12, "num_sums": 10, "num_different": 0}
    assert found["sums of joining"] == sums == found["sums of joining, not ahead"]
    joined = found["joining, beside not ahead"]
    assert joined["num_answers"] > 0
    assert joined["different"] == []


def job(tmp_path: Path, program: str, *happens: ends.Happens, timeout_s: float = 20) -> ends.Ended:
    words = [sys.executable, "-c", program]
    return end_of("it", words, tmp_path, timeout_s, lambda code: code == 0, happens)


@pytest.mark.process
def test_a_job_that_ends_wrongly_or_never_is_reported(tmp_path: Path) -> None:
    assert job(tmp_path, "").is_right
    failed = job(tmp_path, "raise SystemExit('why')")
    assert (failed.code, failed.is_right, failed.stderr) == (1, False, "why")
    cut = job(tmp_path, "import time; time.sleep(60)", timeout_s=1)
    assert (cut.code, cut.is_right, cut.num_left) == (None, False, 1)
    child = (
        "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
    )
    left = job(tmp_path, f"import subprocess; {child}", timeout_s=2)
    assert (left.code, left.is_right, left.num_left) == (0, False, 1)


@pytest.mark.process
def test_what_happens_to_a_job_starts_its_clock(tmp_path: Path) -> None:
    def wait(process: subprocess.Popen[str], _: Path) -> None:
        process.wait(timeout=20)

    def kill(process: subprocess.Popen[str], _: Path) -> None:
        process.send_signal(signal.SIGTERM)

    found = job(tmp_path, "import time; time.sleep(60)", kill)
    assert found.code == -signal.SIGTERM
    assert job(tmp_path, "import time; time.sleep(2)", wait).seconds < 1


@needs_mpi
@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.process
def test_programs_of_two_ranks_end_as_documented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ends.json"
    flags = ("--device", "cpu", "--repeats", "1", "--output", str(output))
    assert ends.main(["--folder", str(tmp_path), *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(output.read_text())
    names = ["question", "batch", "streaming", "sampling", "generate", "leader killed"]
    names += ["worker killed", "error on a rank", "SIGTERM", "Control-C"]
    assert [job["name"] for job in found["jobs"]] == names
    assert found["num_right"] == len(names)
