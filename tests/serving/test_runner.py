"""The runner: whole answers, requests that share steps, stop strings, timings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import Answer, GenerationRequest, GenerationResult
from runtime.serving.loop import Loop
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.shared_loop import SharedLoop

Images = Callable[[str], Path]


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Runner:
    return Runner.open(float32_engine_dir, torch.device("cpu"))


def ask(question: str, *paths: Path, num_tokens: int = 12, **options: object) -> GenerationRequest:
    return GenerationRequest.images_first(question, paths, max_new_tokens=num_tokens, **options)


@pytest.fixture
def questions(images: Images) -> list[GenerationRequest]:
    """No, one, and three images; different lengths."""
    landscape, portrait = images("landscape_800x450.png"), images("portrait_400x1000.png")
    return [
        ask("Describe this image.", landscape),
        ask("What is 2 + 2?", num_tokens=20),
        ask("How many?", landscape, portrait, images("pixel_1x1.png"), num_tokens=5),
        ask("Warm?", portrait, sampling=SamplingParams(temperature=0.8, seed=3)),
    ]


def same(a: GenerationResult, b: GenerationResult) -> bool:
    return replace(a, timings=b.timings) == b


def test_requests_that_share_steps_get_the_answers_they_get_alone(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    alone = [runner.generate(question) for question in questions]
    together = dict(runner.generate_batch(questions))
    for index, expected in enumerate(alone):
        found = together[index]
        assert isinstance(found, GenerationResult)
        assert same(found, expected), index


def test_a_request_joins_while_another_decodes(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    expected = [runner.generate(question) for question in questions[:2]]
    first: list[Answer] = []
    second: list[Answer] = []
    with Loop(runner, max_open=2) as loop:
        loop.submit(questions[0], first.append)
        for _ in range(4):
            loop.turn()
        loop.submit(questions[1], second.append)
        while loop.num_open:
            loop.turn()
    for pieces, alone in zip((first, second), expected, strict=True):
        assert pieces[-1].result is not None
        assert same(pieces[-1].result, alone)


def test_a_second_batch_or_question_meanwhile_shares_the_steps_of_the_first(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    """From one thread, which another test of the file finds as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_loop", SharedLoop())
        expected = [runner.generate(question) for question in questions]
        first, second = runner.generate_batch(questions), runner.generate_batch(questions)
        found = [dict([next(first)]), dict([next(second)])]
        pieces = runner.stream(questions[0])
        text = next(pieces).text
        assert same(runner.generate(questions[1]), expected[1])
        text += "".join(piece.text for piece in pieces)
        assert text == expected[0].text
        abandoned = runner.generate_batch(questions)
        next(abandoned)
        abandoned.close()
        for each, batch in zip(found, (first, second), strict=True):
            each |= dict(batch)
            for index, alone in enumerate(expected):
                result = each[index]
                assert isinstance(result, GenerationResult)
                assert same(result, alone)
        assert runner.decoder.step() == []
        runner._loop.close()


def test_a_server_is_refused_while_a_question_is_open_and_a_question_while_a_server_is(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    """Two loops over one decoder would each miss the other's tokens."""
    pieces = runner.stream(questions[1])
    next(pieces)
    with pytest.raises(UserError, match="answering already"):
        Server(runner)
    pieces.close()
    server = Server(runner)
    with pytest.raises(UserError, match="ask that server"):
        runner.generate(questions[1])
    server.close()
    assert runner.generate(questions[1]).num_tokens == 20


def test_streamed_text_adds_up_to_the_answer(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    for question in questions:
        pieces = list(runner.stream(question))
        text, result = "".join(piece.text for piece in pieces), pieces[-1].result
        assert result is not None
        assert text == result.text == runner.tokenizer.decode(result.token_ids)


def test_a_stop_string_ends_the_answer_and_frees_its_place(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    whole = runner.generate(questions[0]).text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    result = runner.generate(replace(questions[0], stop=(middle,)))
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(middle)]
    assert runner.decoder.step() == []


def test_num_tokens_and_reason_say_why_an_answer_ended(runner: Runner) -> None:
    result = runner.generate(ask("What?", num_tokens=3))
    assert (result.num_tokens, result.finish_reason) == (3, "length")
    assert len(result.token_ids) == 3


def test_tiles_grids_and_prompt_length_are_reported(runner: Runner, images: Images) -> None:
    tokens_per_tile = runner.engine.vision_config.tokens_per_tile
    result = runner.generate(ask("x", images("landscape_800x450.png"), images("pixel_1x1.png")))
    assert result.grids == [(2, 1), (1, 1)]
    assert result.num_tiles == 3 + 1
    text_only = runner.generate(ask("x"))
    virtual = result.num_tiles * tokens_per_tile
    assert result.num_prompt_tokens > text_only.num_prompt_tokens + virtual


def test_max_num_tiles_limits_the_grid(runner: Runner, images: Images) -> None:
    question = ask("x", images("landscape_800x450.png"), max_num_tiles=1)
    assert runner.generate(question).num_tiles == 1


def test_the_answer_depends_on_each_image_and_on_their_order(
    runner: Runner, images: Images
) -> None:
    one, two = images("landscape_800x450.png"), images("portrait_400x1000.png")
    answers = [
        runner.generate(ask("Compare.", *paths)).token_ids
        for paths in ((one, two), (two, one), (one, one), (one,))
    ]
    assert len({tuple(answer) for answer in answers}) == 4


def test_images_may_be_bytes(runner: Runner, images: Images) -> None:
    path = images("landscape_800x450.png")
    from_path = runner.generate(ask("x", path))
    content: tuple[str | Path | bytes, ...] = (path.read_bytes(), "\n", "x")
    from_bytes = runner.generate(GenerationRequest(content, max_new_tokens=12))
    assert from_bytes.token_ids == from_path.token_ids


def test_the_two_prompt_formats_differ(runner: Runner, images: Images) -> None:
    path = images("landscape_800x450.png")
    published = runner.generate(ask("x", path))
    megatron = runner.generate(ask("x", path, prompt_format="megatron"))
    # A newline after each of two <|im_end|>; the tag apart may change the token count too.
    assert megatron.num_prompt_tokens >= published.num_prompt_tokens + 2


def test_timings_add_up(runner: Runner, images: Images) -> None:
    timings = runner.generate(ask("x", images("landscape_800x450.png"))).timings
    parts = (timings.tiling_ms, timings.vision_ms, timings.prefill_ms, timings.decode_ms)
    assert min(parts) > 0
    assert sum(parts) + timings.queue_ms == pytest.approx(timings.total_ms, rel=0.01)
    assert timings.decode_tokens_per_s == pytest.approx(11 / timings.decode_ms * 1e3)


def test_cancelled_requests_leave_the_others_alone(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    expected = runner.generate(questions[0])
    kept: list[Answer] = []
    unwanted: list[Answer] = []
    with Loop(runner, max_open=2) as loop:
        loop.submit(questions[0], kept.append)
        ticket = loop.submit(questions[1], unwanted.append)
        loop.turn()
        loop.cancel(ticket)
        unwanted.clear()
        while loop.num_open:
            loop.turn()
    assert unwanted == []
    assert kept[-1].result is not None
    assert same(kept[-1].result, expected)


def test_one_bad_request_does_not_end_a_batch(
    runner: Runner, questions: list[GenerationRequest], tmp_path: Path
) -> None:
    batch = [questions[0], ask("x", tmp_path / "absent.png"), questions[1]]
    results = dict(runner.generate_batch(batch))
    assert isinstance(results[1], UserError)
    assert isinstance(results[0], GenerationResult)
    assert isinstance(results[2], GenerationResult)


def test_onnx_runtime_and_torch_vision_give_the_same_answers(
    onnx_engine_dir: Path, engine_dir: Path, images: Images
) -> None:
    """The same checkpoint twice; bfloat16 and float32 vision may part only after some tokens."""
    question = ask("x", images("landscape_800x450.png"), num_tokens=2)
    answers = []
    for directory in (onnx_engine_dir, engine_dir):
        assert EngineDir.read(directory).limits.max_num_images == 3
        answers.append(Runner.open(directory, torch.device("cpu")).generate(question).token_ids)
    assert answers[0] == answers[1]


def test_a_batch_nobody_listens_to_any_more_frees_its_places(
    runner: Runner, questions: list[GenerationRequest]
) -> None:
    batch = runner.generate_batch(questions)
    next(batch)
    batch.close()
    assert runner.decoder.step() == []


def test_a_gpu_that_is_not_the_current_one_is_refused(
    float32_engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"cuda:1 is not .* current GPU \(cuda:0\); .*DEVICES=1"):
        Runner.open(float32_engine_dir, torch.device("cuda:1"))
