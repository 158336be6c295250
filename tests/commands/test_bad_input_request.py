"""Requests that an engine cannot answer, and flags of run.py that contradict each other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.asking import Images, answered, ask, batch, run_refused
from tests.support.command import (
    BUILD,
    CONVERT,
    RUN,
    background,
    one_line_error,
    refused,
    run_command,
)


def test_a_prompt_longer_than_max_input_len_is_refused_with_both_numbers(
    engine_dir: Path, images: Images, tmp_path: Path
) -> None:
    limit = json.loads((engine_dir / "manifest.json").read_text())["limits"]["max_input_len"]
    fits = limit - answered(engine_dir, "--prompt", "1")["num_prompt_tokens"] + 1
    assert answered(engine_dir, "--prompt", "1" * fits)["num_prompt_tokens"] == limit
    fragments = (f"{limit + 1} tokens", str(limit), "shorten", "--max_input_len")
    run_refused(engine_dir, tmp_path, "--prompt", "1" * (fits + 1), fragments=fragments)
    # Images count as well, and so does the system message.
    flags = ("--image", images("square_448x448.png"), "--prompt", "1" * fits)
    run_refused(engine_dir, tmp_path, *flags, fragments=("--max_input_len",))
    flags = ("--system", "1" * limit, "--prompt", "1")
    run_refused(engine_dir, tmp_path, *flags, fragments=("--max_input_len",))


def test_more_images_than_built_for_are_refused_with_both_numbers(
    engine_dir: Path, images: Images, tmp_path: Path
) -> None:
    four = [images("pixel_1x1.png")] * 4
    fragments = ("4 images", "takes 3", "--max_num_images")
    run_refused(engine_dir, tmp_path, "--image", *four, "--prompt", "hi", fragments=fragments)
    # Before they are read: the count alone is wrong.
    four = [tmp_path / "absent.png"] * 4
    run_refused(engine_dir, tmp_path, "--image", *four, "--prompt", "hi", fragments=fragments)


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}
LARGE_SCHEMA = {"enum": [f"{number:08}" for number in range(100_000)]}  # over 1 MB

BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "hi", "images": ["bad.png"]}, "bad.png"),
    ({"prompt": "hi", "images": ["absent.png"]}, "absent.png"),
    ({"prompt": "hi", "images": ["nul\0.png"]}, "image"),
    ({"prompt": "hi", "images": ["\ud800.png"]}, "image"),
    ({"prompt": "hi", "images": "good.png"}, "list"),
    ({"prompt": "hi", "images": ["good.png"] * 4}, "4 images"),
    ({"prompt": "x" * 100_000}, "--max_input_len"),
    ({"prompt": "\ud800"}, "Unicode"),
    ({"prompt": "hi", "system": "\udcff"}, "Unicode"),
    ({"prompt": 7}, "prompt is 7"),
    ({"prompt": [{"type": "video", "video": "x"}]}, "video"),
    ({"prompt": [{"type": "text"}]}, "text"),
    ({}, "prompt"),
    ({"prompt": "hi", "unknown": 1}, "unknown"),
    ({"prompt": "hi", "image": "good.png"}, "top_p; did you mean 'images'?"),
    ({"prompt": "hi", "max_tokens": 3}, "did you mean 'max_new_tokens'?"),
    ({"question": "hi"}, "did you mean 'prompt'?"),
    ({"custom_id": "hi", "prompt": "hi"}, "did you mean 'id'?"),
    ({"prompt": "hi", "max_num_tiles": 0}, "max_num_tiles is 0"),
    ({"prompt": "hi", "max_num_tiles": 99}, "max_num_tiles is 99"),
    ({"prompt": "hi", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "hi", "max_new_tokens": -5}, "max_new_tokens is -5"),
    ({"prompt": "hi", "max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
    ({"prompt": "hi", "temperature": -1}, "temperature is -1"),
    ({"prompt": "hi", "temperature": float("nan")}, "temperature is nan"),
    ({"prompt": "hi", "top_p": 0}, "top_p is 0"),
    ({"prompt": "hi", "top_p": 1.5}, "top_p is 1.5"),
    ({"prompt": "hi", "top_k": -1}, "top_k is -1"),
    ({"prompt": "hi", "top_k": True}, "top_k is True"),
    ({"prompt": "hi", "seed": -1}, "seed is -1"),
    ({"prompt": "hi", "seed": 2**64}, "seed is"),
    ({"prompt": "hi", "stop": "end"}, "list of strings"),
    ({"prompt": "hi", "prompt_format": "llama"}, "'llama'"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [USER, ASSISTANT]}, "the last message is the assistant's"),
    ({"messages": [USER], "prompt": "hi"}, "prompt"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "tool"),
    ({"prompt": "hi", "n": 2}, "n is 2 and the sampling is greedy"),
    ({"prompt": "hi", "n": 1000, "temperature": 1.0}, "max_batch_size"),
    ({"prompt": "hi", "min_tokens": 9}, "min_tokens is 9 and max_new_tokens 2"),
    ({"prompt": "hi", "top_logprobs": 2}, "top_logprobs is 2 without logprobs"),
    ({"prompt": "hi", "logit_bias": {"hi": 1.0}}, "logit_bias"),
    ({"prompt": "hi", "logit_bias": {"99999999": 1.0}}, "logit_bias has token id 99999999"),
    ({"prompt": "hi", "bad_words": [""]}, "bad_words"),
    ({"prompt": "hi", "repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"prompt": "hi", "regex": r"[^\s\S]"}, "matches no text"),
    ({"prompt": "hi", "regex": "(a"}, "unclosed group"),
    ({"prompt": "hi", "regex": "a+", "choice": ["a"]}, "regex and choice are both given"),
    ({"prompt": "hi", "regex": "a+", "stop": ["a"]}, "stop is given beside regex"),
    ({"prompt": "hi", "regex": "a+", "ignore_eos": True}, "ignore_eos is given beside regex"),
    ({"prompt": "hi", "json_schema": {"not": {}}}, "the keyword 'not'"),
    ({"prompt": "hi", "json_schema": LARGE_SCHEMA}, "expected 131,072 at most"),
    ({"prompt": "hi", "json_schema": [1]}, "json_schema is [1], expected a JSON schema"),
]


@pytest.mark.parametrize(("request_", "fragment"), BAD_REQUESTS, ids=lambda v: str(v)[:40])
def test_a_bad_request_of_a_batch_is_answered_by_an_error_and_the_others_continue(
    engine_dir: Path, images: Images, tmp_path: Path, request_: dict[str, Any], fragment: str
) -> None:
    (tmp_path / "good.png").write_bytes(images("square_448x448.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no")
    good = {"prompt": "hi", "images": ["good.png"]}
    first, bad, last = batch(engine_dir, tmp_path, [good, request_, good], exit_code=1)
    assert "text" not in bad
    assert fragment in bad["error"]
    assert "\n" not in bad["error"]
    assert first["text"] == last["text"]


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "3", "[" * 100_000, '{"id": 1, "prompt": "hi"} {}'),
        '{"prompt": "first", "prompt": "second"}',
    ],
)
def test_a_batch_line_that_is_no_json_object_is_answered_by_an_error(
    engine_dir: Path, tmp_path: Path, line: str
) -> None:
    (tmp_path / "in").write_text(f'{line}\n{{"prompt": "hi"}}\n')
    files = ("--input_file", tmp_path / "in", "--output_file", tmp_path / "out")
    assert run_command(RUN, *ask(engine_dir, *files)).exit_code == 1
    first, second = (json.loads(text) for text in (tmp_path / "out").read_text().splitlines())
    assert "line 1" in first["error"]
    assert "text" in second


@pytest.mark.parametrize("line_id", ["\ud800", "é\u2028\0", {"a": ["\ud800"]}, 1e300])
def test_any_id_comes_back_as_it_was(engine_dir: Path, tmp_path: Path, line_id: object) -> None:
    lines = [{"id": line_id, "prompt": "hi"}, {"id": 2, "prompt": "hi"}]
    assert [answer["id"] for answer in batch(engine_dir, tmp_path, lines)] == [line_id, 2]


# Flags of run.py.


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ((), ("--prompt", "--input_file")),
        (
            ("--prompt", "a", "--input_file", "b", "--output_file", "c"),
            ("--prompt and --input_file are given", "either", "--prompt"),
        ),
        (("--input_file", "b"), ("--input_file", "--output_file")),
        (("--prompt", "a", "--output_file", "c"), ("--input_file", "--output_file")),
        (("--prompt", "a", "--streaming", "--json"), ("--streaming", "--json")),
        (("--prompt", "a", "--max_num_tiles", "0"), ("--max_num_tiles", "'0'", "positive")),
        (("--prompt", "a", "--max_num_tiles", "99"), ("max_num_tiles is 99", "1 to 6")),
        (("--prompt", "a", "--max_new_tokens", "0"), ("--max_new_tokens", "'0'", "positive")),
        (("--prompt", "a", "--top_p", "0"), ("top_p is 0", "above 0")),
        (("--prompt", "a", "--top_p", "1.5"), ("top_p is 1.5", "at most 1")),
        (("--prompt", "a", "--top_p", "nan"), ("top_p is nan",)),
        (("--prompt", "a", "--top_k", "-1"), ("top_k is -1", "0 (off) to 2^31 - 1")),
        (("--prompt", "a", "--temperature", "-1"), ("temperature is -1", "0 (greedy)")),
        (("--prompt", "a", "--temperature", "inf"), ("temperature is inf",)),
        (("--prompt", "a", "--temperature", "hot"), ("--temperature", "'hot'")),
        (("--prompt", "a", "--seed", "-1"), ("seed is -1", "2^64")),
        (("--prompt", "a", "--seed", str(2**64)), ("seed is", "2^64")),
        (("--prompt", "a", "--n", "2"), ("n is 2", "greedy", "temperature above 0")),
        (("--prompt", "a", "--n", "99", "--top_p", "0.5"), ("n is 99", "max_batch_size")),
        (("--prompt", "a", "--n", "2", "--streaming"), ("--streaming", "--n is 2")),
        (("--prompt", "a", "--min_tokens", "3"), ("min_tokens is 3", "max_new_tokens 2")),
        (("--prompt", "a", "--logprobs"), ("--logprobs", "--json")),
        (("--prompt", "a", "--json", "--top_logprobs", "3"), ("top_logprobs is 3", "logprobs")),
        (("--prompt", "a", "--logit_bias", "5=1"), ("--logit_bias", "'5=1'")),
        (("--prompt", "a", "--bad_words", ""), ("bad_words is ['']", "not empty")),
        (("--prompt", "a", "--prompt_format", "llama"), ("--prompt_format", "'llama'", "hf")),
        (("--prompt", "a", "--image"), ("--image",)),
        (("--prompt",), ("--prompt",)),
        (("--promp", "a"), ("--promp",)),
        (("--prompt", "a", "--tp_size", "2"), ("--tp_size",)),
    ],
    ids=lambda value: " ".join(value) if not value or value[0].startswith("--") else None,
)
def test_run_flags_that_are_wrong_are_refused(
    engine_dir: Path, tmp_path: Path, flags: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    run_refused(engine_dir, tmp_path, *flags, fragments=fragments)


def test_answers_do_not_go_into_the_file_of_requests(engine_dir: Path, tmp_path: Path) -> None:
    path = request_file(tmp_path)
    files = ("--input_file", path, "--output_file", path.parent / "." / path.name)
    run_refused(engine_dir, tmp_path, *files, fragments=(f"are both {path}",))


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_more_ranks_than_built_for_are_refused_with_the_right_number(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Without mpi4py; with it, tests/ranks/test_rank_failures.py."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv(variable, "2")
    fragments = ("tp_size=1", "2 ranks", "mpirun -n 1")
    run_refused(engine_dir, tmp_path, "--prompt", "hi", fragments=fragments)


def test_an_empty_prompt_is_answered(engine_dir: Path, images: Images) -> None:
    """The template around it is not empty, with or without an image."""
    assert "text" in answered(engine_dir, "--prompt", "")
    assert "text" in answered(engine_dir, "--prompt", "", "--system", "")
    image = ("--image", images("pixel_1x1.png"))
    assert answered(engine_dir, "--prompt", "", *image)["num_tiles"] == 1


@pytest.mark.parametrize("flag", ["--prompt", "--system"])
def test_bytes_that_are_no_utf_8_are_refused(engine_dir: Path, tmp_path: Path, flag: str) -> None:
    """Python hands such bytes of a command line over as lone surrogates."""
    flags = (flag, "caf\udce9", *(() if flag == "--prompt" else ("--prompt", "hi")))
    run_refused(engine_dir, tmp_path, *flags, fragments=("'\\udce9'", "UTF-8"))


def request_file(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_text('{"id": "a", "prompt": "hi"}\n{"id": "b", "prompt": "ho"}\n')
    return path


def test_an_input_file_that_cannot_be_read_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b'{"prompt": "\xe9"}\n')
    for name, fragment in (("absent", "No such file"), (".", "directory"), ("latin1", "UTF-8")):
        files = ("--input_file", tmp_path / name, "--output_file", tmp_path / "out")
        run_refused(engine_dir, tmp_path, *files, fragments=("--input_file", fragment))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
@pytest.mark.process
def test_an_input_file_that_is_a_device_is_refused(
    engine_dir: Path, tmp_path: Path, device: str
) -> None:
    """Reading /dev/zero never ends."""
    files = ("--input_file", device, "--output_file", tmp_path / "out")
    result = background(RUN, *ask(engine_dir, *files), log=tmp_path / "log").wait(20)
    one_line_error(result, f"--input_file {device}", "device", "give a JSONL file")
    assert not (tmp_path / "out").exists()


def test_an_input_file_may_be_a_pipe(engine_dir: Path, tmp_path: Path) -> None:
    """As in `--input_file <(...)`."""
    readable, writable = os.pipe()
    os.write(writable, b'{"id": "a", "prompt": "hi"}\n')
    os.close(writable)
    files = ("--input_file", f"/dev/fd/{readable}", "--output_file", tmp_path / "out")
    result = run_command(RUN, *ask(engine_dir, *files))
    os.close(readable)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out").read_text())["id"] == "a"
    assert result.error == "1 request, 0 failed"


@pytest.mark.parametrize("place", ["absent/out", "in.jsonl/out", ".", "x" * 300])
def test_an_output_file_that_cannot_be_written_is_refused(
    engine_dir: Path, tmp_path: Path, place: str
) -> None:
    files = ("--input_file", request_file(tmp_path), "--output_file", tmp_path / place)
    run_refused(engine_dir, tmp_path, *files, fragments=("--output_file", Path(place).name))


@pytest.mark.parametrize("place", ["/dev/null", "pipe"])
@pytest.mark.process
def test_an_output_file_that_is_no_regular_file_is_refused(
    engine_dir: Path, tmp_path: Path, place: str
) -> None:
    """What was answered cannot be read back from it: reading a pipe waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    files = ("--input_file", request_file(tmp_path), "--output_file", tmp_path / place)
    result = background(RUN, *ask(engine_dir, *files), log=tmp_path / "log").wait(20)
    one_line_error(result, "--output_file", place, "regular file")


def test_more_than_the_memory_holds_is_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Built for a larger machine: the line says which number to lower."""
    start = ("--checkpoint_dir", checkpoint_dir, "--engine_dir", tmp_path / "engine")
    flags = ("--vision", "torch", "--max_batch_size", "100000000")
    assert run_command(BUILD, *start, *flags).exit_code == 0
    fragments = ("GB", "--max_batch_size")
    run_refused(tmp_path / "engine", tmp_path, "--prompt", "hi", fragments=fragments)


@pytest.mark.parametrize(
    "content",
    ["something else\n", '{"id": "z", "text": "x"}\n', "[]\n", '{"text": "x"}\n', "\xff\n"],
)
def test_an_output_file_of_something_else_is_refused_and_kept(
    engine_dir: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "out").write_text(content, encoding="latin-1")
    files = ("--input_file", request_file(tmp_path), "--output_file", tmp_path / "out")
    fragments = ("--output_file", "line 1", "another output file")
    run_refused(engine_dir, tmp_path, *files, fragments=fragments)


def test_an_output_file_that_is_the_input_file_is_refused_and_kept(
    engine_dir: Path, tmp_path: Path
) -> None:
    path = request_file(tmp_path)
    files = ("--input_file", path, "--output_file", path)
    run_refused(engine_dir, tmp_path, *files, fragments=("--output_file",))


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        (CONVERT, "--model_dir"),
        (CONVERT, "--output_dir"),
        (BUILD, "--checkpoint_dir"),
        (BUILD, "--engine_dir"),
        (RUN, "--engine_dir"),
    ],
)
def test_a_required_flag_that_is_missing_is_named(name: str, flag: str, tmp_path: Path) -> None:
    required = {
        CONVERT: ("--model_dir", "--output_dir"),
        BUILD: ("--checkpoint_dir", "--engine_dir"),
        RUN: ("--engine_dir",),
    }[name]
    given = [part for other in required if other != flag for part in (other, tmp_path / "x")]
    refused(tmp_path, name, *given, fragments=(flag, "required", "--help"))


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_no_gpu
def test_device_cuda_without_a_gpu_is_refused(
    model_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    fragments = ("--device cuda", "no CUDA GPU", "--device cpu")
    where = ("--model_dir", model_dir, "--output_dir", tmp_path / "new")
    refused(tmp_path, CONVERT, *where, "--device", "cuda", fragments=fragments)
    flags = ("--engine_dir", engine_dir, "--prompt", "hi", "--device", "cuda")
    refused(tmp_path, RUN, *flags, fragments=fragments)
