"""`run.py --compare`: what a report says of engines that agree and of engines that do not."""

from __future__ import annotations

import errno
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from runtime.answers import compare
from runtime.answers.compare import Recording, Run, differences, record
from runtime.decoder.executor import StepOutput
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.conftest import Workshop
from tests.support.cases import ONE_TILE, SEVEN_TILES
from tests.support.command import RUN, one_line_error, run_command


def report(engine_dir: Path, reference: Path, *flags: object) -> dict[str, object]:
    result = run_command(
        RUN,
        *("--engine_dir", engine_dir, "--compare", reference, "--device", "cpu", "--json"),
        *("--max_new_tokens", 6, *flags),
    )
    assert result.exit_code == 0, result.stderr
    values: dict[str, object] = json.loads(result.stdout)
    return values


def test_an_engine_equals_itself_with_no_error(engine_dir: Path) -> None:
    asked = ("--prompt", ONE_TILE.text, "--image", *ONE_TILE.paths)
    found = report(engine_dir, engine_dir, *asked)
    assert found["num_equal"] == 1
    (request,) = found["requests"]  # type: ignore[misc]
    assert request == {
        "num_tokens": 6,
        "first_differing_token": None,
        "vision_error": 0.0,
        "logit_error": 0.0,
        "margin": None,
    }
    assert found["tokens_per_s"] > 0  # type: ignore[operator]


def test_fp8_vision_shows_as_an_error_of_vision_and_logits(
    workshop: Workshop, checkpoint_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    fp8 = workshop.engine(
        "engine_fp8_vision", checkpoint_dir, vision="torch", vision_precision="FP8"
    )
    lines = [{"id": i, "prompt": "What?", "images": [str(SEVEN_TILES.paths[0])]} for i in range(2)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report(fp8, engine_dir, "--input_file", tmp_path / "requests.jsonl")
    requests = found["requests"]
    assert isinstance(requests, list)
    assert len(requests) == 2
    for request in requests:
        assert 0.001 < request["vision_error"] < 0.05
        assert request["logit_error"] > 0


def test_what_only_one_engine_cannot_take_is_reported_before_either_is_loaded(
    workshop: Workshop, checkpoint_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    narrow = workshop.engine("engine_of_one_image", checkpoint_dir, vision="torch")
    lines = [{"prompt": "What?", "images": [str(ONE_TILE.paths[0])] * n} for n in (1, 2)]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for engine, reference in ((engine_dir, narrow), (narrow, engine_dir)):
        flags = ("--compare", reference, "--device", "cpu", "--input_file", path)
        with patch.object(Runner, "open", side_effect=AssertionError("loaded")):
            result = run_command(RUN, "--engine_dir", engine, *flags)
        one_line_error(result, f"{narrow} cannot answer {path} line 2: ", "2 images", "takes 1")


class _Watched:
    """A decoder that counts how many rows of logits it gave are still in memory."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self) -> list[StepOutput]:
        self.most = max(self.most, sum(ref() is not None for ref in self.given))
        outputs: list[StepOutput] = self._decoder.step()
        self.given += [
            weakref.ref(output.logits) for output in outputs if output.logits is not None
        ]
        return outputs


def test_memory_holds_the_logits_of_a_step_and_files_all(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    request = GenerationRequest.images_first("What?", ONE_TILE.paths, max_new_tokens=24)
    with Runner.open(engine_dir, torch.device("cpu")) as runner:
        watched = runner.decoder = _Watched(runner.decoder)
        run = record(runner, [request] * 3)
    assert len(watched.given) >= 3 * 12
    assert watched.most <= runner.engine.limits.max_batch_size
    for recording in run.recordings:
        num_tokens = len(recording.logits)
        assert num_tokens >= len(recording.token_ids) > 12
        assert recording.logits[: len(recording.token_ids)].argmax(1).tolist() == (
            recording.token_ids
        )
        mapped = Path("/proc/self/maps").read_text().splitlines()
        assert sum("nvlm_compare_" in line and ".logits" in line for line in mapped) >= 3
    assert list(tmp_path.iterdir()) == [], "files are left"


def test_a_full_disk_is_reported_with_its_folder(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compare, "open", full, raising=False)
    result = run_command(
        RUN, "--engine_dir", engine_dir, "--compare", engine_dir, "--device", "cpu", "--prompt", "x"
    )
    one_line_error(result, "nvlm_compare_", "No space left", "TMPDIR")


def run_of(token_ids: list[int], logits: list[list[float]]) -> Run:
    return Run([Recording(token_ids, None, torch.tensor(logits))], seconds=1.0)


def test_only_what_both_saw_alike_is_compared() -> None:
    engine = run_of([1, 0, 5], [[0, 1, 0], [2.0, 1.0, 0], [9, 9, 9]])
    reference = run_of([1, 1, 7], [[0, 1, 0], [1.5, 2.0, 0], [0, 0, 0]])
    (found,) = differences(engine, reference)
    assert found.first_differing_token == 1
    assert found.margin == pytest.approx(0.5)  # preferred by 0.5, logits differ by up to 1
    expected = torch.tensor([[0, 1, 0], [1.5, 2.0, 0]]).norm()
    assert found.logit_error == pytest.approx(float((0.25 + 1.0) ** 0.5 / expected))
    assert "token 1 of 3 differs" in found.line()


def test_one_token_is_no_plural() -> None:
    for num_tokens, message in ((1, "1 token equal"), (2, "all 2 tokens equal")):
        answer = run_of([7] * num_tokens, [[0.0, 1.0]] * num_tokens)
        (found,) = differences(answer, answer)
        assert found.line().startswith(message)


def test_an_answer_that_ends_early_differs_where_it_ends() -> None:
    (found,) = differences(run_of([1, 2], [[0.0]] * 2), run_of([1, 2, 3], [[0.0]] * 3))
    assert found.first_differing_token == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--streaming",),
        ("--output_file", "out.jsonl"),
        ("--show_tiles", "tiles.png", "--image", ONE_TILE.paths[0]),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_do_not_go_with_it_are_refused(
    engine_dir: Path, flags: tuple[object, ...]
) -> None:
    result = run_command(
        RUN, "--engine_dir", engine_dir, "--compare", engine_dir, "--prompt", "x", *flags
    )
    one_line_error(result, "--compare", f"no {flags[0]}")
