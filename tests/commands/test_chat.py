"""`run.py --chat` over pipes and in a terminal, and `run.py --messages`."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from runtime.answers.chat import Chat
from runtime.engine.engine_dir import EngineDir
from runtime.requests.messages import Message
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.runner import Runner
from tests.support.asking import Images, answered, ask, run_refused
from tests.support.command import EXIT_USER_ERROR, ROOT, RUN, Result, run_command

WIDE, PIXEL = "landscape_800x450.png", "pixel_1x1.png"


def talk(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, *lines: object, flags: tuple[Any, ...] = ()
) -> Result:
    """What the lines, sent through a pipe, are answered."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run_command(RUN, *ask(engine_dir, "--chat", *flags))


def errors(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_lines_are_turns_of_one_conversation(
    engine_dir: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are those of the same messages asked at once."""
    found = talk(
        engine_dir,
        monkeypatch,
        f"/image {images(WIDE)}",
        "What is it?",
        "",
        "And?",
        f"/image {images(PIXEL)}",
        "Is <image> like it?",
    )
    assert (found.exit_code, errors(found)) == (0, [])
    with Runner.open(engine_dir, "cpu") as runner:
        history: tuple[Message, ...] = ()
        expected = ""
        for content in (
            (images(WIDE), "\n", "What is it?"),
            ("And?",),
            ("Is ", images(PIXEL), " like it?"),
        ):
            request = GenerationRequest(content, history=history, max_new_tokens=2)
            text = runner.generate(request).text
            history = (*history, Message("user", content), Message("assistant", (text,)))
            expected += f"{text}\n"
    assert found.stdout == expected


def test_answers_have_the_form_that_is_asked_for(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = talk(engine_dir, monkeypatch, "Is it?", "Sure?", flags=("--choice", "yes", "no"))
    assert whole.exit_code == 0
    assert set(whole.stdout.split()) <= {"yes", "no"}
    assert "was cut" not in caplog.text
    cut = talk(
        engine_dir, monkeypatch, "Is it?", flags=("--regex", "[ab]{9}", "--max_new_tokens", 4)
    )
    assert len(cut.stdout.strip()) == 4
    assert "was cut after 4 tokens and does not match regex" in caplog.text


def test_clear_forgets_and_quit_ends(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = talk(engine_dir, monkeypatch, "Hello").stdout
    second = talk(engine_dir, monkeypatch, "Hello", "Hello").stdout
    assert second != first * 2, "this test needs an answer that depends on the history"
    cleared = talk(engine_dir, monkeypatch, "Hello", "/clear", "Hello", "/quit", "Hello")
    assert cleared.stdout == first * 2
    assert cleared.exit_code == 0
    assert talk(engine_dir, monkeypatch).stdout == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/help", "there is no /help, expected /image PATH, /clear, /quit; a question that"),
        ("/image", "/image names no picture"),
        ("/image  ", "/image names no picture"),
        ("/image none.png", "none.png cannot be read"),
        ("/image https://x/y.png", "nothing is fetched"),
        (f"/image {ROOT / 'run.py'}", "is not"),
        ("Is it <image>?", "the number of <image> in the text is 1 and that of images 0"),
        ("word " * 4000, "--max_input_len"),
        ("bad \udcff", "not valid Unicode"),
    ],
    ids=lambda value: str(value)[:20].encode(errors="replace").decode(),
)
def test_a_line_that_is_refused_changes_nothing(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    """One line on stderr; the conversation continues as if it had not been."""
    expected = talk(engine_dir, monkeypatch, "Hello", "So?").stdout
    found = talk(engine_dir, monkeypatch, "Hello", line, "So?")
    assert found.stdout == expected
    (error,) = errors(found)
    assert message in error
    assert found.exit_code == 1


def test_pictures_of_all_turns_count(
    engine_dir: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixel = f"/image {images(PIXEL)}"
    found = talk(engine_dir, monkeypatch, pixel, pixel, "a", pixel, "b", pixel, "/clear", pixel)
    (error,) = errors(found)
    assert "4 images, the engine takes 3" in error


def test_image_is_shown_with_the_first_question(engine_dir: Path, images: Images) -> None:
    with pytest.MonkeyPatch.context() as patch:
        path = images(WIDE)
        found = talk(engine_dir, patch, "What?", flags=("--image", path))
        assert found.stdout == answered_text(engine_dir, "--image", path, "--prompt", "What?")


def answered_text(engine_dir: Path, *flags: object) -> str:
    return run_command(RUN, *ask(engine_dir, *flags)).stdout


class Interrupted:
    """A runner whose answer is interrupted after its second piece."""

    def __init__(self, engine: EngineDir, num_signals: int) -> None:
        self.engine, self._num_signals = engine, num_signals
        self.requests: list[GenerationRequest] = []
        self.num_pieces = 0

    def stream(self, request: GenerationRequest) -> Generator[Answer, None, None]:
        self.requests.append(request)
        for piece in ("one ", "two ", "three "):
            self.num_pieces += 1
            if piece == "two ":
                for _ in range(self._num_signals):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0)  # where Python handles it
            yield Answer(piece)


def test_control_c_stops_an_answer_and_what_was_said_stays(
    engine_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    runner = Interrupted(EngineDir.read(engine_dir), 1)
    chat = Chat(runner, GenerationRequest(()))  # type: ignore[arg-type]
    assert chat.take("Count.")
    assert capsys.readouterr().out == "one two \n"
    assert runner.num_pieces == 2
    assert signal.getsignal(signal.SIGINT) is before
    runner._num_signals = 0
    assert chat.take("Go on.")
    said = (Message("user", ("Count.",)), Message("assistant", ("one two ",)))
    assert runner.requests[1].history == said


def test_a_second_control_c_ends_the_program(engine_dir: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    chat = Chat(Interrupted(EngineDir.read(engine_dir), 2), GenerationRequest(()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        chat.take("Count.")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.process
def test_a_terminal_is_asked_and_answered(engine_dir: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *map(str, ask(engine_dir, "--chat"))],
        cwd=ROOT,
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )
    os.close(follower)
    shown = b""

    def read_until(num_prompts: int) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while shown.count(b"> ") < num_prompts:
            assert time.monotonic() < deadline, shown
            if select.select([leader], [], [], 0.1)[0]:
                shown += os.read(leader, 4096)

    try:
        read_until(1)
        os.write(leader, b"Hello\n")
        read_until(2)
        os.write(leader, b"\x04")  # Control-D
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(leader)
    answer = answered_text(engine_dir, "--prompt", "Hello").strip()
    assert answer in shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "a", "--chat"), "give either --prompt or --input_file, --messages or --chat"),
        (("--prompt", "a", "--messages", "m"), "give either"),
        (("--chat", "--json"), "--chat prints each answer as it comes; it takes no --json"),
        (("--chat", "--compare", "x"), "it takes no --compare"),
        (("--messages", "none.json"), "--messages none.json cannot be read"),
        (("--messages", "/dev/null"), "/dev/null is a device"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_refused(
    engine_dir: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    run_refused(engine_dir, tmp_path, *flags, fragments=(message,))


def test_messages_of_a_file_are_asked(engine_dir: Path, images: Images, tmp_path: Path) -> None:
    """With images of the file and of --image; a batch line says the same."""
    (tmp_path / "wide.png").write_bytes(images(WIDE).read_bytes())
    path = tmp_path / "m.json"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "wide.png"}]},
        {"role": "assistant", "content": "So?"},
        {"role": "user", "content": "And <image>?"},
    ]
    path.write_text(json.dumps(messages))
    found = answered(engine_dir, "--messages", path, "--image", images(PIXEL))
    assert found["num_tiles"] == 4
    line = {"messages": messages, "images": [str(images(PIXEL))]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    files = ("--input_file", tmp_path / "in.jsonl", "--output_file", tmp_path / "out.jsonl")
    assert run_command(RUN, *ask(engine_dir, *files)).exit_code == 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer["token_ids"] == found["token_ids"]
    assert answer["num_prompt_tokens"] == found["num_prompt_tokens"]
    line["messages"] = [*messages[:2], {"role": "assistant", "content": "Other."}, messages[3]]
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    changed = run_command(RUN, *ask(engine_dir, *files))
    assert changed.exit_code == EXIT_USER_ERROR
    assert "changed after --output_file" in changed.error
