"""Settings through the whole loop: seeds, several answers, log probabilities, where answers end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.inputs.tokenizer import IM_END
from nvlm.program.errors import UserError
from runtime.answers.answer_file import answer_json
from runtime.decoder.executor import DecoderRequest
from runtime.requests.types import Choice, GenerationRequest, GenerationResult
from runtime.serving.runner import Runner

Images = Callable[[str], Path]
HOT = {"temperature": 5.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        yield runner


def test_without_a_seed_answers_differ_and_name_the_seed_that_repeats_them(runner: Runner) -> None:
    answers = [runner.generate("Well?", **HOT) for _ in range(3)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    for answer in answers:
        assert answer.seed is not None
        again = runner.generate("Well?", **HOT, seed=answer.seed)
        assert again.token_ids == answer.token_ids
        assert again.seed == answer.seed


def test_a_batch_draws_a_seed_for_each_request(runner: Runner) -> None:
    request = GenerationRequest.images_first("Well?", **HOT)
    found = dict(runner.generate_batch([request] * 4))
    results = [each for each in found.values() if isinstance(each, GenerationResult)]
    assert len({each.seed for each in results}) == 4
    assert len({tuple(each.token_ids) for each in results}) == 4


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 1}, {"seed": 4}])
def test_a_greedy_answer_names_no_seed(runner: Runner, settings: dict[str, Any]) -> None:
    result = runner.generate("Well?", max_new_tokens=2, **settings)
    assert result.seed is None
    assert answer_json(result).keys() == {
        *("text", "token_ids", "finish_reason", "num_prompt_tokens", "num_tokens", "num_tiles"),
        *("grids", "boxes", "timings"),
    }


def test_n_answers_are_those_of_n_requests_with_the_seeds_after_it(
    runner: Runner, images: Images
) -> None:
    path = images("landscape_800x450.png")
    asked: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 9, "logprobs": True}
    result = runner.generate("Well?", path, n=4, seed=2**64 - 2, **asked)
    seeds = [2**64 - 2, 2**64 - 1, 0, 1]
    assert [choice.seed for choice in result.choices] == seeds
    for seed, choice in zip(seeds, result.choices, strict=True):
        alone = runner.generate("Well?", path, seed=seed, **asked)
        assert alone.token_ids == choice.token_ids
        assert (alone.text, alone.finish_reason) == (choice.text, choice.finish_reason)
        assert alone.logprobs is not None
        assert choice.logprobs is not None
        expected = [each.logprob for each in alone.logprobs]
        assert [each.logprob for each in choice.logprobs] == pytest.approx(expected, abs=1e-4)
    assert len({tuple(choice.token_ids) for choice in result.choices}) > 1
    assert result.num_tokens == sum(len(choice.token_ids) for choice in result.choices)
    assert (result.text, result.seed) == (result.choices[0].text, seeds[0])
    body = answer_json(result)
    assert [choice["seed"] for choice in body["choices"]] == seeds
    assert "prompt_logprobs" not in body


def test_the_prompt_of_n_answers_is_computed_once(runner: Runner, images: Images) -> None:
    before = runner.decoder.scheduler.num_reused_tokens  # type: ignore[attr-defined]
    path = images("portrait_400x1000.png")
    result = runner.generate("Once?", path, n=3, temperature=1.0, max_new_tokens=2)
    reused = runner.decoder.scheduler.num_reused_tokens - before  # type: ignore[attr-defined]
    assert reused >= 2 * ((result.num_prompt_tokens - 1) // 32 * 32)


def test_pieces_of_n_answers_say_whose_they_are(runner: Runner) -> None:
    request = GenerationRequest.images_first(
        "Well?", n=3, temperature=1.0, seed=1, max_new_tokens=7, logprobs=True
    )
    pieces = list(runner.stream(request))
    *_, last = pieces
    assert last.result is not None
    assert not any(piece.is_last for piece in pieces[:-1])
    for index, choice in enumerate(last.result.choices):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own][-1] == choice.finish_reason
        assert all(piece.finish_reason is None for piece in own[:-1])
        assert [each for piece in own for each in piece.logprobs] == choice.logprobs


def test_logprobs_name_tokens_and_the_likeliest_in_their_place(runner: Runner) -> None:
    result = runner.generate("Well?", max_new_tokens=6, logprobs=True, top_logprobs=3)
    assert result.logprobs is not None
    assert [each.token_id for each in result.logprobs] == result.token_ids
    for each in result.logprobs:
        assert each.token == runner.tokenizer.text_of(each.token_id)
        assert len(each.top_logprobs) == 3
        likeliest = each.top_logprobs[0]  # greedy
        assert (likeliest.token_id, likeliest.logprob) == (each.token_id, each.logprob)
    assert runner.generate("Well?", max_new_tokens=6).logprobs is None


def test_logprobs_of_the_prompt_come_with_the_whole_answer(runner: Runner, images: Images) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 2}
    path = images("landscape_800x450.png")
    runner.generate("Well?", path, **asked)
    result = runner.generate("Well?", path, prompt_logprobs=1, **asked)
    listed = result.prompt_logprobs
    assert listed is not None
    assert len(listed) == result.num_prompt_tokens
    assert listed[0] is None
    num_rows = result.num_tiles * runner.engine.vision_config.tokens_per_tile
    assert sum(each is None for each in listed) == 1 + num_rows
    assert all(each.logprob < 0 and len(each.top_logprobs) == 1 for each in listed if each)
    assert result.token_ids == runner.generate("Well?", path, **asked).token_ids


def test_a_stop_string_is_kept_where_that_is_asked(runner: Runner) -> None:
    whole = runner.generate("Well?", max_new_tokens=12).text
    stop = whole[4:6]
    without = runner.generate("Well?", max_new_tokens=12, stop=[stop])
    kept = runner.generate("Well?", max_new_tokens=12, stop=[stop], include_stop_str_in_output=True)
    assert (without.finish_reason, kept.finish_reason) == ("stop", "stop")
    assert kept.text == without.text + stop
    assert kept.token_ids == without.token_ids
    held = runner.generate("Well?", max_new_tokens=12, stop=[stop], min_tokens=12)
    assert held.text == whole


def test_min_tokens_and_ignore_eos_hold_the_end_back(runner: Runner) -> None:
    end = runner.tokenizer.special_id(IM_END)
    towards_end: dict[str, Any] = {"logit_bias": {end: 100.0}, "max_new_tokens": 5}
    assert runner.generate("Well?", **towards_end).num_tokens == 0
    held = runner.generate("Well?", **towards_end, min_tokens=3)
    assert (held.num_tokens, held.finish_reason) == (3, "stop")
    ignored = runner.generate("Well?", **towards_end, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason, ignored.text) == ([end] * 5, "length", "")


def test_a_bad_word_is_not_written_with_a_space_or_without(runner: Runner) -> None:
    words: list[str] = []
    for _ in range(5):
        result = runner.generate("Well?", max_new_tokens=8, bad_words=words)
        assert not any(word in result.text.split() for word in words)
        words.append(runner.tokenizer.text_of(result.token_ids[0]).strip() or "x")
    assert len(set(words)) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs is 2 without logprobs; ask for logprobs too"),
        ({"n": 2}, "n is 2 and the sampling is greedy, which gives one answer 2 times; give"),
        ({"n": 2, "temperature": 1.0, "top_k": 1}, "n is 2 and the sampling is greedy"),
        ({"n": 1000, "temperature": 1.0}, "n is 1000 and the engine's max_batch_size "),
        ({"n": 0}, "n is 0, expected 1 to the engine's max_batch_size"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens is 9 and max_new_tokens 8; lower"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has token id 1000000, expected 0 to "),
        ({"end_ids": [5, 10**6]}, "end_ids has token id 1000000, expected 0 to "),
    ],
)
def test_settings_that_contradict_are_refused_in_one_line(
    runner: Runner, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        runner.generate("Well?", **settings)
    assert "\n" not in str(refused.value)
    assert runner.generate("Well?", max_new_tokens=1).num_tokens == 1


def test_an_answer_that_fails_ends_all_n_and_leaves_their_places(runner: Runner) -> None:
    asked = GenerationRequest.images_first("Well?", n=3, temperature=1.0, max_new_tokens=400)
    pieces = runner.stream(asked)
    next(pieces)
    pieces.close()
    assert runner.decoder.step() == []  # nothing is left of it


def test_a_draft_that_the_decoder_refuses_takes_the_others_along(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, submitted = runner.decoder.submit, []

    def refuse_third(request: DecoderRequest) -> int:
        if len(submitted) == 2:
            raise UserError("no more")
        submitted.append(submit(request))
        return submitted[-1]

    monkeypatch.setattr(runner.decoder, "submit", refuse_third)
    with pytest.raises(UserError, match="no more"):
        runner.generate("Well?", n=3, temperature=1.0)
    assert runner.decoder.step() == []


def test_choices_hold_what_the_first_answers_fields_hold(runner: Runner) -> None:
    result = runner.generate("Well?", max_new_tokens=3)
    assert result.choices == (
        Choice(result.text, result.token_ids, result.finish_reason, result.boxes),
    )
