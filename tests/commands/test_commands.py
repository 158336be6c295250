"""The programs as a user runs them: answers on stdout, logs on stderr, make targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm.formats.manifest import verify_all
from tests.support.asking import answered, ask
from tests.support.command import BUILD, CONVERT, PLAIN, ROOT, RUN, run_command, run_process

Images = Callable[[str], Path]


def test_convert_build_and_run_as_processes_give_an_answer(
    tmp_path: Path, model_dir: Path, images: Images
) -> None:
    """The whole path as the README has it, with nothing shared between the steps but files."""
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    flags = ("--model_dir", model_dir, "--output_dir", checkpoint, "--calib_size", "2")
    assert run_process(CONVERT, *flags).exit_code == 0
    flags = ("--checkpoint_dir", checkpoint, "--engine_dir", engine, "--vision", "torch")
    assert run_process(BUILD, *flags).exit_code == 0
    verify_all(engine, "engine")
    photo = images("landscape_800x450.png")
    result = run_process(RUN, *ask(engine, "--image", photo, "--prompt", "What is it?", "--json"))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1, "stdout carries one JSON object and nothing else"
    answer = json.loads(lines[0])
    assert answer["num_tiles"] == 3
    assert answer["num_tokens"] == len(answer["token_ids"]) == 2
    assert set(answer["timings"]) >= {"tiling_ms", "vision_ms", "prefill_ms"}


def test_plain_streaming_and_json_print_the_same_text(engine_dir: Path) -> None:
    flags = ask(engine_dir, "--prompt", "Hello there", "--max_new_tokens", "9")
    plain, streamed, as_json = (
        run_command(RUN, *flags, *more) for more in ((), ("--streaming",), ("--json",))
    )
    assert plain.stdout == streamed.stdout == json.loads(as_json.stdout)["text"] + "\n"


@pytest.mark.parametrize("how", [(), ("--streaming",), ("--json",)], ids=str)
def test_an_answer_is_utf_8_whatever_the_locale(engine_dir: Path, how: tuple[str, ...]) -> None:
    flags = ask(engine_dir, "--prompt", "Hello", "--max_new_tokens", "64")
    flags += ("--temperature", "3", "--seed", "0")
    expected = run_command(RUN, *flags, "--json")
    assert not expected.stdout.isascii(), "this test needs an answer beyond ASCII"
    found = run_process(RUN, *flags, *how, environment={"PYTHONIOENCODING": "ascii"})
    assert found.exit_code == 0, found.stderr
    text = json.loads(found.stdout)["text"] if how == ("--json",) else found.stdout[:-1]
    assert text == json.loads(expected.stdout)["text"]


def test_a_seed_repeats_a_sampled_answer_and_another_changes_it(engine_dir: Path) -> None:
    def sampled(seed: int) -> list[int]:
        flags = ("--prompt", "Tell me", "--top_p", "0.95", "--max_new_tokens", "12")
        token_ids: list[int] = answered(engine_dir, *flags, "--seed", seed)["token_ids"]
        return token_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_dry_runs_print_a_plan_and_write_nothing(
    tmp_path: Path, model_dir: Path, checkpoint_dir: Path
) -> None:
    flags = ("--model_dir", model_dir, "--output_dir", tmp_path / "c", "--dry_run")
    plan = json.loads(run_command(CONVERT, *flags).stdout)
    stored = (checkpoint_dir / "rank0.safetensors").stat().st_size
    assert plan["rank_bytes"] == [pytest.approx(stored, rel=0.05)]
    flags = ("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "e", "--dry_run")
    plan = json.loads(run_command(BUILD, *flags).stdout)
    assert plan["fits"] is True
    assert plan["limits"]["max_multimodal_len"] == 8 * 7 * 4
    assert plan["kv_bytes_per_token"] == 2 * 2 * 2 * 32, "layers, K and V, heads, head_dim"
    plan = json.loads(run_command(BUILD, *flags, "--memory_gb", "0.001").stdout)
    assert (plan["fits"], plan["memory_bytes"]) == (False, 1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_if_stale_makes_again_exactly_what_has_changed(tmp_path: Path, model_dir: Path) -> None:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"

    def made_again(directory: Path, name: str, *flags: object) -> bool:
        """Whether the command wrote another directory."""
        before = directory.stat().st_ino if directory.exists() else None
        result = run_command(name, *flags, "--if_stale")
        assert result.exit_code == 0, result.stderr
        return directory.stat().st_ino != before

    def convert(*more: object) -> bool:
        flags = ("--model_dir", model_dir, "--output_dir", checkpoint, *PLAIN, *more)
        return made_again(checkpoint, CONVERT, *flags)

    def build(*more: object) -> bool:
        flags = ("--checkpoint_dir", checkpoint, "--engine_dir", engine, "--vision", "torch")
        return made_again(engine, BUILD, *flags, *more)

    assert (convert(), build()) == (True, True)
    assert (convert(), build()) == (False, False)
    assert build("--max_batch_size", "2"), "other arguments"
    assert convert("--dtype", "float32"), "other arguments"
    assert build("--max_batch_size", "2"), "another checkpoint"
    (checkpoint / "manifest.json").unlink()
    assert run_command(BUILD, "--checkpoint_dir", checkpoint, "--engine_dir", engine).exit_code == 2


def make(target: str, *flags: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """`make` with this Python in place of a fresh environment."""
    variables = {"BIN": Path(sys.executable).parent, **variables}
    settings = [f"{name}={value}" for name, value in variables.items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", *flags, target, *settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_make_engine_converts_builds_and_then_skips(tmp_path: Path, model_dir: Path) -> None:
    variables = {
        "MODEL_DIR": model_dir,
        "CHECKPOINT_DIR": tmp_path / "checkpoint",
        "ENGINE_DIR": tmp_path / "engine",
        "QUANT": "none",
        "VISION": "torch",
    }
    first = make("engine", **variables)
    assert first.returncode == 0, first.stderr
    verify_all(tmp_path / "engine", "engine")
    second = make("engine", **variables)
    assert second.stderr.count("is up to date") == 2, second.stderr


def test_make_engine_is_one_command_from_checkpoint_to_engine_for_any_ranks() -> None:
    """What it would run, with the flags of a production build."""
    variables = {"MODEL_DIR": "/m", "CHECKPOINT_DIR": "/c", "ENGINE_DIR": "/e", "TP": 4}
    printed = make("engine", "--dry-run", QUANT="FP8", DECODER="tensorrt_llm", **variables).stdout
    words = " ".join(printed.replace("\\\n", " ").split())
    assert '--model_dir "/m" --output_dir "/c" --quant_algo FP8 --tp_size 4 --if_stale' in words
    assert '--checkpoint_dir "/c" --engine_dir "/e" --decoder tensorrt_llm --vision auto' in words


def test_make_triton_serves_an_engine_on_the_ports_asked_for() -> None:
    variables = {"ENGINE_DIR": "/e", "HTTP_PORT": 1, "GRPC_PORT": 2, "METRICS_PORT": 3}
    printed = make("triton", "--dry-run", "-o", "setup-triton", TRITON_FLAGS="--unary", **variables)
    words = " ".join(printed.stdout.replace("\\\n", " ").split())
    assert '-m frontends.triton.serve --engine_dir "/e" --http_port 1 --grpc_port 2' in words
    assert "--metrics_port 3 --unary" in words


def test_make_takes_a_containers_python_as_it_is() -> None:
    """As docker/Dockerfile does, where `mpirun` and TensorRT-LLM belong to that Python."""
    result = make("doctor", SYSTEM_PYTHON=1, PYTHON=sys.executable, VENV="/nowhere")
    assert result.returncode == 0, result.stderr
    assert "--decoder tensorrt_llm" in result.stdout


def test_make_continues_where_tensorrt_rtx_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "pip").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "pip").chmod(0o755)
    stamp, cpu = tmp_path / ".tensorrt-rtx", tmp_path / ".cpu"
    result = make(str(stamp), "-o", str(cpu), VENV=tmp_path, BIN=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the tests that build with it skip" in result.stderr
    assert not stamp.exists(), "it would not be tried again"


def test_make_engine_without_a_model_says_what_it_needs() -> None:
    result = make("engine", MODEL_DIR="")
    assert result.returncode != 0
    assert "make engine needs MODEL_DIR" in result.stderr


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_world_size_that_is_no_number_is_reported(engine_dir: Path, variable: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, "many")
        result = run_command(RUN, *ask(engine_dir, "--prompt", "hi"))
    assert result.exit_code == 2
    assert f"error: {variable}=many" in result.stderr


def test_nobody_is_advised_to_delete_a_checkpoint_given_as_an_engine(checkpoint_dir: Path) -> None:
    result = run_command(RUN, *ask(checkpoint_dir, "--prompt", "hi"))
    assert result.exit_code == 2
    assert "is of kind 'checkpoint', expected kind 'engine'" in result.stderr
    assert "delete" not in result.stderr


def test_the_root_directory_is_no_output_place(checkpoint_dir: Path) -> None:
    flags = ("--checkpoint_dir", checkpoint_dir, "--engine_dir", "/", "--vision", "torch")
    result = run_command(BUILD, *flags, "--overwrite")
    assert result.exit_code == 2
    assert "mount point" in result.stderr


@pytest.mark.parametrize(("command", "code"), [((), 130), (("nohup",), 0)], ids=["ssh", "nohup"])
def test_a_closed_terminal_ends_a_program_unless_it_is_to_be_ignored(
    command: tuple[str, ...], code: int
) -> None:
    program = (
        "import os, signal\n"
        "from nvlm.program.command_line import run\n"
        "run(lambda: os.kill(os.getpid(), signal.SIGHUP))\n"
    )
    done = subprocess.run(
        [*command, sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr
