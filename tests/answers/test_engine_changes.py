"""An engine whose files change while a program has them mapped: no answer of it is believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nvlm.formats import layout
from runtime.decoder.executor import StepOutput
from runtime.engine import mapped_files
from runtime.engine.engine_dir import EngineDir
from runtime.engine.mapped_files import EngineChangedError, MappedFiles
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.runner import Runner
from tests.support.asking import ask
from tests.support.command import RUN, one_line_error, run_command

CPU = torch.device("cpu")
RANK = f"{layout.LLM}/{layout.rank_file(0)}"
NUM_REQUESTS = 40


@pytest.fixture
def engine(float32_engine_dir: Path, tmp_path: Path) -> Path:
    """With its checkpoint's file beside it, of which its own is a hard link."""
    engine = shutil.copytree(float32_engine_dir, tmp_path / "engine")
    os.link(engine / RANK, tmp_path / "checkpoint_rank0")
    return engine


def overwrite(path: Path) -> None:
    """As somebody does who converts again by hand: other weights of the same size."""
    with open(path, "r+b") as file:
        file.seek(-50_000, os.SEEK_END)
        file.write(bytes(50_000))


def touch(path: Path) -> None:
    os.utime(path)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)


def copy_over(path: Path) -> None:
    """The same bytes in another file."""
    other = path.with_name("other")
    shutil.copy(path, other)
    other.rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "overwrite": overwrite,
    "replace": replace,
    "remove": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", [RANK, f"{layout.VISION}/{layout.WEIGHTS}"])
def test_a_file_that_changed_is_not_believed(
    engine: Path, change: Callable[[Path], None], name: str
) -> None:
    mapped = MappedFiles.of(EngineDir.read(engine), CPU)
    mapped.require_unchanged()
    change(engine / name)
    for _ in range(2):
        with pytest.raises(EngineChangedError, match="was changed or replaced while"):
            mapped.require_unchanged()


@pytest.mark.parametrize("change", [touch, copy_over])
def test_a_file_that_only_looks_changed_is_hashed_once(
    engine: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = MappedFiles.of(EngineDir.read(engine), CPU)
    hashed = []
    digest = mapped_files.sha256_of
    monkeypatch.setattr(mapped_files, "sha256_of", lambda path: hashed.append(path) or digest(path))
    mapped.require_unchanged()
    assert hashed == []
    change(engine / RANK)
    for _ in range(3):
        mapped.require_unchanged()
    assert hashed == [engine / RANK]


def test_copies_on_a_gpu_are_not_concerned(engine: Path) -> None:
    mapped = MappedFiles.of(EngineDir.read(engine), torch.device("cuda"))
    overwrite(engine / RANK)
    mapped.require_unchanged()


def test_what_was_written_to_after_the_manifest_is_hashed_when_it_is_opened(engine: Path) -> None:
    """Otherwise only the size of large files is looked at, and a rerun would believe them."""
    entry = EngineDir.read(engine)
    overwrite(engine / RANK)
    with pytest.raises(EngineChangedError):
        MappedFiles.of(entry, CPU)


def changes_after(number: int, path: Path, results: Iterator[object]) -> Iterator[object]:
    for index, result in enumerate(results):
        if index == number:
            overwrite(path)
        yield result


def test_answers_made_meanwhile_are_refused_and_those_before_are_right(
    engine: Path, tmp_path: Path
) -> None:
    requests = [
        GenerationRequest.of(f"Question {i}?", max_new_tokens=8) for i in range(NUM_REQUESTS)
    ]
    with Runner.open(engine, CPU) as runner:
        expected = [runner.generate(request).token_ids for request in requests]
        found = {}
        with pytest.raises(EngineChangedError):
            for index, result in runner.generate_batch(requests):
                assert isinstance(result, GenerationResult)
                found[index] = result.token_ids
                if len(found) == 12:
                    overwrite(tmp_path / "checkpoint_rank0")
        assert 12 <= len(found) < NUM_REQUESTS
        assert all(expected[index] == tokens for index, tokens in found.items())
        with pytest.raises(EngineChangedError):
            runner.generate("And now?", max_new_tokens=2)


def test_so_where_a_thread_of_the_runners_own_takes_the_steps(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as two questions share a step."""
    with Runner.open(engine, CPU) as runner:
        step = runner.decoder.step

        def changes_once_shared() -> list[StepOutput]:
            outputs = step()
            if len(outputs) == 2:
                overwrite(engine / RANK)
            return outputs

        monkeypatch.setattr(runner.decoder, "step", changes_once_shared)
        streams = [runner.stream(text, max_new_tokens=1500) for text in ("One?", "Two?")]
        for stream in streams:
            next(stream)
        for stream in streams:
            with pytest.raises(EngineChangedError):
                list(stream)


def test_a_batch_ends_with_one_line_and_a_rerun_believes_it_no_more(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"id": i, "prompt": f"Question {i}?"} for i in range(NUM_REQUESTS)]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = (RUN, *ask(engine, "--input_file", tmp_path / "in", "--output_file"))
    assert run_command(*command, tmp_path / "expected").exit_code == 0
    generate_batch = Runner.generate_batch
    with monkeypatch.context() as patch:
        patch.setattr(
            Runner,
            "generate_batch",
            lambda *arguments: changes_after(
                20, tmp_path / "checkpoint_rank0", generate_batch(*arguments)
            ),
        )
        result = run_command(*command, tmp_path / "out")
    got = one_line_error(result, RANK, "answers since then are refused", "build_engine.py")
    assert "hard link" in got
    found = (tmp_path / "out").read_bytes().splitlines()
    expected = (tmp_path / "expected").read_bytes().splitlines()
    assert 0 < len(found) < NUM_REQUESTS
    for line, right in zip(found, expected, strict=False):
        assert json.loads(line)["text"] == json.loads(right)["text"]
    one_line_error(run_command(*command, tmp_path / "out"), RANK, "SHA-256")
    assert (tmp_path / "out").read_bytes().splitlines() == found
