"""Batch files: JSONL in, JSONL out, in order, resumable."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvlm.program.errors import UserError
from runtime.answers.answer_file import AnswerFile, answer_json
from runtime.answers.batch import run_batch, summary
from runtime.answers.run_record import BATCH, EngineId, RunRecord, record_path, settings_of
from runtime.requests.request_file import RequestLine, read_requests
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import GenerationRequest, GenerationResult, Timings
from runtime.serving.runner import Runner
from tests.support.command import tree
from tests.support.locks import LocksFail

DEFAULTS = GenerationRequest(content=(), max_new_tokens=4)


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    runner = Runner.open(float32_engine_dir, torch.device("cpu"))
    yield runner
    runner.close()


class EchoRunner:
    """Answers with the prompt, last request first, as one that finishes out of order might.

    "fail" is refused; "stop" ends the process as Ctrl-C would.
    """

    def __init__(self, digest: str = "e" * 64) -> None:
        self.asked: list[str] = []
        self.engine = SimpleNamespace(
            manifest=SimpleNamespace(digest=digest), directory=Path(f"/{digest[0]}")
        )

    def generate_batch(
        self, requests: Sequence[GenerationRequest]
    ) -> Iterator[tuple[int, GenerationResult | UserError]]:
        for index, request in reversed(list(enumerate(requests))):
            text = str(request.content[-1])
            self.asked.append(text)
            if text == "stop":
                raise KeyboardInterrupt
            yield index, UserError("refused") if text == "fail" else result(text)


class FailingRunner(EchoRunner):
    """Refuses "q" and each of some numbers; and, as the loop does, a picture that is missing."""

    def __init__(self, *failing: int) -> None:
        super().__init__()
        self._failing = {f"q{index}" for index in failing}

    def generate_batch(
        self, requests: Sequence[GenerationRequest]
    ) -> Iterator[tuple[int, GenerationResult | UserError]]:
        for index, (position, found) in enumerate(super().generate_batch(requests)):
            paths = [part for part in requests[position].content if isinstance(part, Path)]
            if paths:
                yield position, UserError(f"image {paths[0]} cannot be read")
            else:
                failed = self.asked[index] in self._failing
                yield position, UserError("refused") if failed else found


def result(text: str) -> GenerationResult:
    timings = Timings(*[1.23456] * 7)
    return GenerationResult(text, [1, 2], "stop", 7, 2, 0, [], [], timings)


def write_lines(path: Path, *values: Any) -> Path:
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def request_of(folder: Path, line: Any) -> GenerationRequest | UserError:
    (read,) = read_requests(write_lines(folder / "in.jsonl", line), DEFAULTS)
    return read.request


def error_of(folder: Path, line: Any) -> str:
    error = request_of(folder, line)
    assert isinstance(error, UserError), f"accepted: {error}"
    return str(error)


def answer(folder: Path, runner: Any, *lines: Any, name: str = "out.jsonl") -> list[dict[str, Any]]:
    requests = read_requests(write_lines(folder / "in.jsonl", *lines), DEFAULTS)
    run_batch(runner, requests, folder / name)
    return read_lines(folder / name)


def without_timings(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if k != "timings"} for item in answers]


class TestReading:
    def test_a_prompt_alone_takes_the_defaults_and_its_line_number_as_id(
        self, tmp_path: Path
    ) -> None:
        path = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, "", {"prompt": "b"})
        expected = [
            RequestLine(1, replace(DEFAULTS, content=("a",)), 1, tmp_path),
            RequestLine(3, replace(DEFAULTS, content=("b",)), 3, tmp_path),
        ]
        assert read_requests(path, DEFAULTS) == expected

    def test_every_field_arrives(self, tmp_path: Path) -> None:
        line = {
            "id": {"any": ["json"]},
            "prompt": "q",
            "images": ["a.png", "deep/b.png"],
            "system": "s",
            "prompt_format": "megatron",
            "max_new_tokens": 9,
            "max_num_tiles": 2,
            "stop": ["x", "y"],
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.25,
            "seed": 8,
        }
        (read,) = read_requests(write_lines(tmp_path / "in.jsonl", line), DEFAULTS)
        assert read.id == {"any": ["json"]}
        assert read.request == GenerationRequest(
            content=(tmp_path / "a.png", "\n", tmp_path / "deep/b.png", "\n", "q"),
            system="s",
            prompt_format="megatron",
            max_new_tokens=9,
            max_num_tiles=2,
            stop=("x", "y"),
            sampling=SamplingParams(temperature=0.5, top_k=3, top_p=0.25, seed=8),
        )

    def test_a_prompt_of_parts_keeps_images_in_line(self, tmp_path: Path) -> None:
        parts = [
            {"type": "text", "text": "left "},
            {"type": "image", "image": "a.png"},
            {"type": "text", "text": " right"},
            {"type": "image", "image": "/abs/b.png"},
        ]
        request = request_of(tmp_path, {"prompt": parts})
        assert isinstance(request, GenerationRequest)
        assert request.content == ("left ", tmp_path / "a.png", " right", Path("/abs/b.png"))

    def test_null_is_as_good_as_leaving_out(self, tmp_path: Path) -> None:
        line = {"prompt": "a", "system": None, "images": None, "top_p": None, "stop": None}
        assert request_of(tmp_path, line) == replace(DEFAULTS, content=("a",))

    @pytest.mark.parametrize(
        ("given", "temperature"),
        [({"top_k": 5}, 1.0), ({"top_p": 0.5}, 1.0), ({"seed": 5}, 0.0), ({"temperature": 2}, 2.0)],
    )
    def test_a_filter_without_a_temperature_samples_at_one(
        self, tmp_path: Path, given: dict[str, float], temperature: float
    ) -> None:
        request = request_of(tmp_path, {"prompt": "a", **given})
        assert isinstance(request, GenerationRequest)
        assert request.sampling.temperature == temperature

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ('{"prompt": "a"} {}', "not JSON"),
            ("[1]", "expected a JSON object, found list"),
            ('"text"', "expected a JSON object, found str"),
            ({}, "prompt is None"),
            ({"prompt": 5}, "prompt is 5"),
            ({"prompt": ["a"]}, "prompt part 'a'"),
            ({"prompt": [{"type": "text"}]}, "prompt part {'type': 'text'}"),
            ({"prompt": [{"type": "image", "image": 3}]}, "prompt part"),
            ({"prompt": [{"type": "video", "video": "x"}]}, "prompt part"),
            ({"prompt": [], "images": ["a.png"]}, "prompt is [], expected one or more parts"),
            (
                {"prompt": [{"type": "text", "text": "a"}], "images": ["a.png"]},
                "images stands beside",
            ),
            ({"prompt": "a", "image": "a.png"}, "unknown field 'image', expected bad_words, "),
            ({"prompt": "a", "images": "a.png"}, "images is 'a.png', expected a list of strings"),
            ({"prompt": "a", "images": [1]}, "images is [1]"),
            ({"prompt": "a", "stop": "x"}, "stop is 'x'"),
            ({"prompt": "a", "system": 1}, "system is 1"),
            ({"prompt": "a", "prompt_format": "chat"}, "prompt_format is 'chat'"),
            ({"prompt": "a", "max_new_tokens": "8"}, "max_new_tokens is '8', expected int"),
            ({"prompt": "a", "max_new_tokens": 8.0}, "max_new_tokens is 8.0"),
            ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens is True"),
            ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot', expected float"),
            ({"prompt": "a", "temperature": -1}, "temperature is -1"),
            ('{"prompt": "a", "temperature": NaN}', "temperature is nan"),
            ({"prompt": "a", "top_p": 0}, "top_p is 0"),
            ({"prompt": "a", "top_k": -2}, "top_k is -2"),
            ({"prompt": "a", "seed": 2**64}, f"seed is {2**64}"),
        ],
        ids=str,
    )
    def test_a_bad_line_is_an_error_that_names_file_line_and_field(
        self, tmp_path: Path, line: Any, message: str
    ) -> None:
        error = error_of(tmp_path, line)
        assert error.startswith(f"{tmp_path / 'in.jsonl'} line 1")
        assert message in error

    def test_a_bad_line_spoils_no_other(self, tmp_path: Path) -> None:
        path = write_lines(
            tmp_path / "in.jsonl", {"prompt": "a"}, "{", {"id": 9, "x": 1}, {"prompt": "b"}
        )
        read = read_requests(path, DEFAULTS)
        assert [isinstance(line.request, UserError) for line in read] == [False, True, True, False]
        assert [line.id for line in read] == [1, 2, 9, 4]

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
    def test_only_a_newline_ends_a_line(self, tmp_path: Path, separator: str) -> None:
        """Unicode's other line ends may stand unescaped in a JSON string."""
        prompt = f"one{separator}two"
        path = write_lines(tmp_path / "in.jsonl", f'{{"prompt": "{prompt}"}}')
        (line,) = read_requests(path, DEFAULTS)
        assert line.request == replace(DEFAULTS, content=(prompt,))

    def test_windows_line_ends_and_a_missing_last_newline_do_not_matter(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "in.jsonl"
        path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b"}')
        contents = [
            line.request.content
            for line in read_requests(path, DEFAULTS)
            if isinstance(line.request, GenerationRequest)
        ]
        assert contents == [("a",), ("b",)]

    def test_a_missing_file_and_one_that_is_not_utf8_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--input_file .*none.jsonl cannot be read"):
            read_requests(tmp_path / "none.jsonl", DEFAULTS)
        (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
        with pytest.raises(UserError, match=r"bad.jsonl is not UTF-8"):
            read_requests(tmp_path / "bad.jsonl", DEFAULTS)


class TestWriting:
    def test_answers_stand_in_the_order_of_requests_whatever_finished_first(
        self, tmp_path: Path
    ) -> None:
        runner = EchoRunner()
        lines = [{"id": i, "prompt": f"q{i}"} for i in (3, 1, 2)]
        answers = answer(tmp_path, runner, *lines)
        assert runner.asked == ["q2", "q1", "q3"]
        assert [(item["id"], item["text"]) for item in answers] == [(3, "q3"), (1, "q1"), (2, "q2")]

    def test_an_answer_line_holds_the_documented_fields(self, tmp_path: Path) -> None:
        (item,) = answer(tmp_path, EchoRunner(), {"prompt": "a"})
        assert item["timings"].pop("tiling_ms") == 1.235
        documented = {"id", "text", "finish_reason", "num_prompt_tokens", "num_tokens"}
        documented |= {"num_tiles", "token_ids", "timings"}
        assert documented <= set(item)
        assert "error" not in item

    def test_requests_that_fail_have_an_error_instead_of_text_and_the_others_continue(
        self, tmp_path: Path
    ) -> None:
        lines = [{"prompt": "a"}, "{", {"prompt": "fail"}, {"prompt": "b"}]
        answers = answer(tmp_path, EchoRunner(), *lines)
        assert [item.get("text") for item in answers] == ["a", None, None, "b"]
        assert "not JSON" in answers[1]["error"]
        assert answers[2] == {"id": 3, "error": "refused"}

    @pytest.mark.parametrize(
        ("prompts", "num_errors"), [(["a", "b"], 0), (["fail"], 1), (["fail", "a", "fail"], 2)]
    )
    def test_the_number_of_errors_is_returned_and_again_by_a_rerun(
        self, tmp_path: Path, prompts: list[str], num_errors: int
    ) -> None:
        path = write_lines(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in prompts))
        requests = read_requests(path, DEFAULTS)
        for _ in range(2):
            assert run_batch(EchoRunner(), requests, tmp_path / "out.jsonl") == num_errors  # type: ignore[arg-type]

    def test_an_empty_file_gives_an_empty_file(self, tmp_path: Path) -> None:
        assert answer(tmp_path, EchoRunner()) == []

    @pytest.mark.parametrize(
        "ids", [["x", "x"], [2, None], [1, 1.0], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]]
    )
    def test_requests_that_share_an_id_are_refused_before_anything_is_asked(
        self, tmp_path: Path, ids: list[Any]
    ) -> None:
        """Their answers could not be distinguished. A line without an id has its number."""
        lines = [{"id": each, "prompt": "q"} if each else {"prompt": "q"} for each in ids]
        runner = EchoRunner()
        with pytest.raises(UserError, match=r"^lines 1 and 2 of --input_file have the same id "):
            answer(tmp_path, runner, *lines)
        assert runner.asked == []
        assert not (tmp_path / "out.jsonl").exists()

    def test_ids_that_look_alike_are_two(self, tmp_path: Path) -> None:
        lines = [{"id": each, "prompt": "q"} for each in (1, "1", True, 1.5, [1])]
        assert len(answer(tmp_path, EchoRunner(), *lines)) == 5

    def test_an_error_does_not_repeat_a_picture(self, tmp_path: Path) -> None:
        """As base64, wherever it was put."""
        data = "iVBORw0KGgo" * 2000
        lines: list[Any] = [
            {"prompt": "q", "images": [f"data:image/png,{data}"]},
            {"prompt": "q", "image": data, data: 1},
            {"prompt": [{"type": "picture", "data": data}]},
            {"prompt": {"image": data}},
            {"prompt": "q", "images": data},
            {"prompt": "q", "seed": data},
        ]
        text = json.dumps(answer(tmp_path, FailingRunner(), *lines))
        assert text.count('"error"') == len(lines)
        assert len(text) < 500 * len(lines)
        assert "iVBORw0KGgo" * 10 not in text

    @pytest.mark.parametrize("text", ["猫 🦊", "a\u2028b\u0085c", 'quote " \\ \n\t\x00'])
    def test_any_text_survives(self, tmp_path: Path, text: str) -> None:
        (item,) = answer(tmp_path, EchoRunner(), {"id": text, "prompt": text})
        assert (item["id"], item["text"]) == (text, text)
        assert answer(tmp_path, EchoRunner(), {"id": text, "prompt": text}) == [item]

    def test_a_lone_surrogate_in_an_id_does_not_end_the_run(self, tmp_path: Path) -> None:
        answers = answer(tmp_path, EchoRunner(), '{"id": "\\ud800", "prompt": "a"}')
        assert [item["text"] for item in answers] == ["a"]

    @pytest.mark.parametrize("name", ["missing/out.jsonl", "."])
    def test_an_output_file_that_cannot_be_written_is_the_users_mistake(
        self, tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(UserError, match="--output_file"):
            answer(tmp_path, EchoRunner(), {"prompt": "a"}, name=name)


class TestResuming:
    LINES = tuple({"id": f"id{i}", "prompt": f"q{i}"} for i in range(5))

    @pytest.mark.parametrize("num_bytes_of_the_third", [0, 1, 20, -1])
    def test_a_rerun_resumes_after_the_last_whole_line(
        self, tmp_path: Path, num_bytes_of_the_third: int
    ) -> None:
        """-1 leaves everything but the newline."""
        expected = answer(tmp_path, EchoRunner(), *self.LINES)
        output = tmp_path / "out.jsonl"
        whole = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(whole[:2]) + whole[2][:num_bytes_of_the_third])
        runner = EchoRunner()
        assert answer(tmp_path, runner, *self.LINES) == expected
        assert sorted(runner.asked) == ["q2", "q3", "q4"]
        assert output.read_bytes() == b"".join(whole)

    def test_a_rerun_of_a_finished_file_asks_nothing_and_changes_nothing(
        self, tmp_path: Path
    ) -> None:
        answer(tmp_path, EchoRunner(), *self.LINES)
        before = (tmp_path / "out.jsonl").read_bytes()
        runner = EchoRunner()
        answer(tmp_path, runner, *self.LINES)
        assert runner.asked == []
        assert (tmp_path / "out.jsonl").read_bytes() == before

    def test_an_interrupted_run_leaves_whole_lines_and_can_resume(
        self, tmp_path: Path, runner: Runner
    ) -> None:
        """Real executors answer in order here; the third request interrupts."""

        class Interrupted:
            engine = runner.engine

            def generate_batch(self, requests: Sequence[GenerationRequest]) -> Iterator[Any]:
                for index, item in enumerate(runner.generate_batch(requests)):
                    if index == 2:
                        raise KeyboardInterrupt
                    yield item

        with pytest.raises(KeyboardInterrupt):
            answer(tmp_path, Interrupted(), *self.LINES)
        assert [item["id"] for item in read_lines(tmp_path / "out.jsonl")] == ["id0", "id1"]
        resumed = answer(tmp_path, runner, *self.LINES)
        fresh = answer(tmp_path, runner, *self.LINES, name="fresh.jsonl")
        assert without_timings(resumed) == without_timings(fresh)

    @pytest.mark.parametrize(
        "change",
        [
            {"prompt": "other"},
            {"images": ["other.png"]},
            {"system": "Be brief."},
            {"max_new_tokens": 5},
            {"seed": 7},
            {"stop": ["x"]},
        ],
        ids=str,
    )
    def test_an_answer_to_what_is_asked_otherwise_now_is_refused(
        self, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        lines = [{"prompt": f"q{i}"} for i in range(3)]  # known by their position alone
        answer(tmp_path, EchoRunner(), *lines)
        before = tree(tmp_path)
        changed = write_lines(tmp_path / "in.jsonl", lines[0], {**lines[1], **change}, lines[2])
        requests = read_requests(changed, DEFAULTS)
        with pytest.raises(UserError, match=r"^line 2 of --input_file .* from its line 2 on"):
            run_batch(EchoRunner(), requests, tmp_path / "out.jsonl")  # type: ignore[arg-type]
        assert {**tree(tmp_path), "in.jsonl": ""} == {**before, "in.jsonl": ""}
        whole = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "out.jsonl").write_bytes(whole[0])  # as the message says
        runner = EchoRunner()
        run_batch(runner, requests, tmp_path / "out.jsonl")  # type: ignore[arg-type]
        assert len(runner.asked) == 2

    def test_a_changed_default_is_a_changed_request(self, tmp_path: Path) -> None:
        answer(tmp_path, EchoRunner(), {"prompt": "q"})
        longer = read_requests(tmp_path / "in.jsonl", replace(DEFAULTS, max_new_tokens=9))
        with pytest.raises(UserError, match=r"^line 1 of --input_file"):
            run_batch(EchoRunner(), longer, tmp_path / "out.jsonl")  # type: ignore[arg-type]

    def test_an_answer_of_another_engine_is_refused(self, tmp_path: Path) -> None:
        answer(tmp_path, EchoRunner(), *self.LINES[:2])
        with pytest.raises(UserError, match=r"engine /e \(eeeeeeee\) .* has /f \(ffffffff\)"):
            answer(tmp_path, EchoRunner("f" * 64), *self.LINES)
        assert len(read_lines(tmp_path / "out.jsonl")) == 2

    def test_a_request_written_or_found_otherwise_is_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another order of fields, a null, a folder that moved."""
        (tmp_path / "a").mkdir()
        answer(tmp_path / "a", EchoRunner(), {"id": 1, "prompt": "q", "images": ["x.png"]})
        (tmp_path / "a").rename(tmp_path / "b")
        monkeypatch.chdir(tmp_path / "b")
        line = {"images": ["x.png"], "prompt": "q", "id": 1, "system": None}
        runner = EchoRunner()
        assert len(answer(Path(), runner, line)) == 1
        assert runner.asked == []

    def test_answers_without_a_record_resume_by_their_ids(self, tmp_path: Path) -> None:
        """As an earlier version left them; what is answered from here on is guarded."""
        answer(tmp_path, EchoRunner(), *self.LINES[:2])
        record_path(tmp_path / "out.jsonl").unlink()
        lines = [{**self.LINES[0], "prompt": "other"}, *self.LINES[1:]]
        runner = EchoRunner()
        answer(tmp_path, runner, *lines)
        assert sorted(runner.asked) == ["q2", "q3", "q4"]
        answer(tmp_path, EchoRunner(), *lines)
        with pytest.raises(UserError, match=r"^line 3 "):
            answer(tmp_path, EchoRunner(), *lines[:2], {**lines[2], "prompt": "other"}, *lines[3:])

    def test_answers_of_a_record_of_version_1_are_held_to_their_engine_alone(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its digests covered settings at their neutral value."""
        answer(tmp_path, EchoRunner(), *self.LINES[:2])
        older = {"engine": "e" * 64, "requests": ["0123", None], "format_version": 1}
        place = record_path(tmp_path / "out.jsonl")
        place.write_text(json.dumps(older))
        with pytest.raises(UserError, match=r"engine of an unknown folder \(eeeeeeee\)"):
            answer(tmp_path, EchoRunner("f" * 64), *self.LINES)
        runner = EchoRunner()
        answer(tmp_path, runner, *self.LINES)
        assert f"{place} is an earlier version's: its 2 answers are kept" in caplog.text
        assert sorted(runner.asked) == ["q2", "q3", "q4"]
        requests = json.loads(place.read_text())["requests"]
        assert requests[:2] == [None, None]
        assert None not in requests[2:]

    def test_a_sampling_setting_that_is_added_later_changes_no_digest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unless it has another value than its neutral one."""

        @dataclass(frozen=True, slots=True)
        class WiderParams(SamplingParams):
            penalty: float = 1.0

        lines = [{**line, "temperature": 0.5} for line in self.LINES]
        answer(tmp_path, EchoRunner(), *lines[:2])
        wider = replace(DEFAULTS, sampling=WiderParams())
        monkeypatch.setattr(sys.modules[__name__], "DEFAULTS", wider)
        runner = EchoRunner()
        answer(tmp_path, runner, *lines)
        assert sorted(runner.asked) == ["q2", "q3", "q4"]
        other = replace(wider, sampling=WiderParams(penalty=1.5))
        assert settings_of(other) == {**settings_of(wider), "penalty": 1.5}
        monkeypatch.setattr(sys.modules[__name__], "DEFAULTS", other)
        with pytest.raises(UserError, match="line 1 of --input_file or a setting of it changed"):
            answer(tmp_path, EchoRunner(), *lines)

    @pytest.mark.parametrize("content", ["[1]", "{}", '{"engine": 1, "requests": []}', "no"])
    def test_a_record_of_something_else_is_refused(self, tmp_path: Path, content: str) -> None:
        answer(tmp_path, EchoRunner(), *self.LINES[:2])
        record_path(tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"out.jsonl.run.json"):
            answer(tmp_path, EchoRunner(), *self.LINES)

    def test_requests_may_be_added_after_the_finished_ones(self, tmp_path: Path) -> None:
        answer(tmp_path, EchoRunner(), *self.LINES[:3])
        runner = EchoRunner()
        answers = answer(tmp_path, runner, *self.LINES)
        assert [item["text"] for item in answers] == [f"q{i}" for i in range(5)]
        assert sorted(runner.asked) == ["q3", "q4"]

    @pytest.mark.parametrize(
        "content",
        [
            b'{"id": "other", "text": "x"}\n',
            b'{"id": "id0", "text": "x"}\n{"id": "id2", "text": "x"}\n',
            b'{"text": "x"}\n',
            b"[1]\n",
            b"notes of mine\n",
            b"\n",
            b"".join(b'{"id": "id%d", "text": "x"}\n' % i for i in range(6)),
            pytest.param(b"notes of mine", id="one line without newline"),
            pytest.param(b'{"id": "id0", "text": "x"}\nmy note', id="foreign half line"),
        ],
    )
    def test_an_output_file_that_belongs_to_something_else_is_refused_and_unharmed(
        self, tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "out.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"--output_file .*out.jsonl"):
            answer(tmp_path, EchoRunner(), *self.LINES)
        assert (tmp_path / "out.jsonl").read_bytes() == content

    def test_an_output_file_that_is_the_input_file_is_refused_and_unharmed(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "in.jsonl"
        content = "\n".join(map(json.dumps, self.LINES))  # editors often leave no last newline
        path.write_text(content)
        requests = read_requests(path, DEFAULTS)
        with pytest.raises(UserError, match="--output_file"):
            run_batch(EchoRunner(), requests, path)  # type: ignore[arg-type]
        assert path.read_text() == content


class TestFailedLines:
    LINES = tuple({"id": f"id{i}", "prompt": f"q{i}"} for i in range(6))

    def failing(self, tmp_path: Path, *indices: int) -> list[dict[str, Any]]:
        return answer(tmp_path, FailingRunner(*indices), *self.LINES)

    def test_a_rerun_asks_them_again_and_the_answers_stand_in_their_place(
        self, tmp_path: Path
    ) -> None:
        expected = answer(tmp_path, EchoRunner(), *self.LINES, name="whole.jsonl")
        failed = self.failing(tmp_path, 1, 4)
        assert [("error" in item) for item in failed] == [i in (1, 4) for i in range(6)]
        runner = EchoRunner()
        assert answer(tmp_path, runner, *self.LINES) == expected
        assert sorted(runner.asked) == ["q1", "q4"]
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert not list(tmp_path.glob("*.tmp"))

    def test_those_that_fail_again_stay_and_lines_to_come_are_answered(
        self, tmp_path: Path
    ) -> None:
        answer(tmp_path, FailingRunner(0, 1), *self.LINES[:3])
        answers = answer(tmp_path, FailingRunner(1), *self.LINES)
        assert [item.get("text") for item in answers] == ["q0", None, "q2", "q3", "q4", "q5"]

    def test_a_line_that_was_fixed_is_answered(self, tmp_path: Path) -> None:
        """Its request is another one now; the others must be as they were."""
        lines: list[dict[str, Any]] = [{"prompt": "a"}, {"promt": "b"}, {"prompt": "c"}]
        assert "unknown field 'promt'" in answer(tmp_path, EchoRunner(), *lines)[1]["error"]
        lines[1] = {"prompt": "b"}
        assert [item["text"] for item in answer(tmp_path, EchoRunner(), *lines)] == ["a", "b", "c"]
        with pytest.raises(UserError, match=r"^line 2 of --input_file"):
            answer(tmp_path, EchoRunner(), lines[0], {"prompt": "B"}, lines[2])

    def test_an_interrupted_rerun_keeps_what_it_had(self, tmp_path: Path) -> None:
        self.failing(tmp_path, 1, 3)
        lines = [*self.LINES]
        requests = read_requests(write_lines(tmp_path / "in.jsonl", *lines), DEFAULTS)

        class Interrupted(EchoRunner):
            def generate_batch(self, requests: Sequence[GenerationRequest]) -> Iterator[Any]:
                yield from list(super().generate_batch(requests))[:1]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_batch(Interrupted(), requests, tmp_path / "out.jsonl")  # type: ignore[arg-type]
        found = read_lines(tmp_path / "out.jsonl")
        assert [("error" in item) for item in found] == [i == 1 for i in range(6)]
        assert [item["id"] for item in found] == [line["id"] for line in lines]

    def test_a_full_disk_leaves_the_file_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.failing(tmp_path, 1)
        before = (tmp_path / "out.jsonl").read_bytes()

        def full(file: FileIO, data: bytes) -> None:
            file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("runtime.answers.line_file._write", full)
        with pytest.raises(UserError, match="its disk is full"):
            answer(tmp_path, EchoRunner(), *self.LINES)
        assert (tmp_path / "out.jsonl").read_bytes() == before
        assert not list(tmp_path.glob("out.jsonl.tmp"))

    def test_the_file_stays_locked_while_it_is_replaced(self, tmp_path: Path) -> None:
        self.failing(tmp_path, 1)
        ids = [line["id"] for line in self.LINES]
        with AnswerFile(tmp_path / "out.jsonl", ids) as file:
            file.replace(1, {"id": "id1", "text": "x"})
            file._save()
            with pytest.raises(UserError, match="another process is writing"):
                AnswerFile(tmp_path / "out.jsonl", ids)

    def test_the_summary_names_them_and_the_file(self, tmp_path: Path) -> None:
        output = tmp_path / "out.jsonl"
        self.failing(tmp_path, 1, 4)
        message = f'6 requests, 2 failed: ids "id1", "id4" in {output}; run the same command to ask'
        assert summary(6, output) == f"{message} again"
        self.failing(tmp_path)
        assert summary(6, output) == "6 requests, 0 failed"
        lines = [{"prompt": f"q{i}"} for i in range(30)]
        answer(tmp_path, FailingRunner(*range(25)), *lines, name="many.jsonl")
        text = summary(30, tmp_path / "many.jsonl")
        assert "30 requests, 25 failed: ids 1, 2, 3, " in text
        assert "20 and 5 more in " in text


class TestWithTheEngine:
    def test_answers_equal_those_of_one_request_at_a_time(
        self, tmp_path: Path, runner: Runner, images: Callable[[str], Path]
    ) -> None:
        """More than a batch, of unequal length, so that they finish out of order."""
        names = ["rgb.jpg", "panorama_1500x300.png", "square_448x448.png"]
        lines = [
            {
                "prompt": "What? " * (i % 4 + 1),
                "images": [str(images(name)) for name in names[: i % 3]],
                "max_num_tiles": i % 3 + 1,
                "max_new_tokens": 1 + (7 * i) % 11,
                "temperature": float(i % 2),
                "seed": i,
            }
            for i in range(12)
        ]
        requests = read_requests(write_lines(tmp_path / "in.jsonl", *lines), DEFAULTS)
        good = [line.request for line in requests if isinstance(line.request, GenerationRequest)]
        assert len(good) == len(lines)
        finished = [index for index, _ in runner.generate_batch(good)]
        assert sorted(finished) == list(range(12))
        assert finished != sorted(finished), "this test needs answers out of order"
        single = [{"id": i, **answer_json(runner.generate(r))} for i, r in enumerate(good, 1)]
        single = json.loads(json.dumps(single))  # tuples become lists
        assert run_batch(runner, requests, tmp_path / "out.jsonl") == 0
        answers = read_lines(tmp_path / "out.jsonl")
        assert without_timings(answers) == without_timings(single)

    def test_images_are_found_beside_the_input_file(
        self, tmp_path: Path, runner: Runner, images: Callable[[str], Path]
    ) -> None:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "a.png").write_bytes(images("square_448x448.png").read_bytes())
        parts = [{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "\nq"}]
        listed, in_line, missing = answer(
            tmp_path,
            runner,
            {"prompt": "q", "images": ["pictures/a.png"]},
            {"prompt": parts},
            {"prompt": "q", "images": ["a.png"]},
        )
        assert listed["num_tiles"] >= 1
        assert without_timings([{**listed, "id": 2}]) == without_timings([in_line])
        assert str(tmp_path / "a.png") in missing["error"]

    def test_a_seed_gives_the_same_answer_in_any_batch(
        self, tmp_path: Path, runner: Runner
    ) -> None:
        def line(seed: int) -> dict[str, Any]:
            return {"prompt": "q", "max_new_tokens": 8, "temperature": 1.5, "seed": seed}

        first = answer(tmp_path, runner, line(1), line(2), line(1), name="first.jsonl")
        second = answer(tmp_path, runner, line(3), line(1), name="second.jsonl")
        tokens = [item["token_ids"] for item in first + second]
        assert tokens[0] == tokens[2] == tokens[4]
        assert len({tuple(ids) for ids in tokens}) == 3

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"prompt": "a", "max_num_tiles": -1}, "max_num_tiles is -1"),
            ({"prompt": "a", "max_num_tiles": 0}, "max_num_tiles is 0"),
            ({"prompt": "a", "max_num_tiles": 7}, "max_num_tiles is 7, expected 1 to 6"),
            ({"prompt": "a " * 4000}, "--max_input_len"),
            ({"prompt": "a", "images": ["x"] * 4}, "4 images.*--max_num_images"),
            ({"prompt": "a", "images": ["."]}, "cannot be read"),
            ('{"prompt": "\\ud800"}', "not valid Unicode"),
            ('{"prompt": "a", "system": "\\ud800"}', "not valid Unicode"),
            ('{"prompt": "a", "images": ["\\u0000"]}', "cannot be read"),
            ('{"prompt": "a", "images": ["\\ud800"]}', "cannot be read"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_what_the_engine_refuses_is_an_error_line_and_the_next_is_answered(
        self, tmp_path: Path, runner: Runner, line: Any, message: str
    ) -> None:
        bad, good = answer(tmp_path, runner, line, {"prompt": "a"})
        assert re.search(message, bad["error"])
        assert good["num_tokens"] == 4


def test_a_full_disk_after_a_cut_line_leaves_a_file_that_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a killed run is cut off first; what then fails must not fill the hole."""
    path = tmp_path / "answers.jsonl"
    whole = b'{"id": 1, "text": "a"}\n'
    path.write_bytes(whole + b'{"id": 2, "te')
    with AnswerFile(path, [1, 2]) as file:
        monkeypatch.setattr(file._file, "_file", FullDisk(file._file._file))
        with pytest.raises(UserError, match="its disk is full"):
            file.append({"id": 2, "text": "b"})
    assert path.read_bytes() == whole
    with AnswerFile(path, [1, 2]) as file:
        assert file.num_finished == 1
        file.append({"id": 2, "text": "b"})
    assert path.read_bytes() == whole + b'{"id": 2, "text": "b"}\n'


class FullDisk:
    """A file that takes five bytes and then no more."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._room = 5

    def write(self, data: memoryview) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written: int = self._file.write(data[: self._room])
        self._room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_two_runs_on_one_output_file_are_kept_apart(tmp_path: Path) -> None:
    with (
        AnswerFile(tmp_path / "answers.jsonl", [1]),
        pytest.raises(UserError, match="another process is writing"),
    ):
        AnswerFile(tmp_path / "answers.jsonl", [1])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_an_output_file_where_no_locks_are_is_written_with_a_warning(
    tmp_path: Path, number: int, locks_fail: LocksFail, caplog: pytest.LogCaptureFixture
) -> None:
    locks_fail(number)
    with AnswerFile(tmp_path / "answers.jsonl", [1]) as file:
        file.append({"id": 1, "text": "x"})
    assert "answers.jsonl lies on a file system without locks" in caplog.text
    locks_fail(errno.EIO)
    with pytest.raises(UserError, match="cannot be locked: Input/output error"):
        AnswerFile(tmp_path / "answers.jsonl", [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a JSON list, expected an object; choose"),
        ('{"engine": 3}', "no record of a run"),
    ],
)
def test_a_damaged_record_of_answers_is_reported_with_what_fixes_it(
    tmp_path: Path, text: str, message: str
) -> None:
    path = record_path(tmp_path / "answers.jsonl")
    path.write_text(text)
    with pytest.raises(UserError, match=f"{message}.*another --output_file"):
        RunRecord.read(path, BATCH)


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = record_path(tmp_path / "answers.jsonl")
    path.mkdir()
    with pytest.raises(UserError, match="Is a directory; choose another --output_file"):
        RunRecord(EngineId("")).write(path, "--output_file")
    assert list(tmp_path.iterdir()) == [path]
