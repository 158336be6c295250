"""A conversation of five turns with three pictures, through the runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.inputs.prompt import PromptFormat
from nvlm.inputs.tokenizer import IM_END
from nvlm.program.errors import UserError
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.requests.messages import Message
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.encoded_pictures import EncodedPictures
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket
from tests.reference import prompts
from tests.support.asking import Images

NUM_TOKENS = 6
PUBLISHED = {
    "hf": prompts.hugging_face_conversation,
    "megatron": prompts.megatron_conversation,
}
PICTURES = ("landscape_800x450.png", "pixel_1x1.png", "portrait_400x1000.png")
NUM_TILES = [3, 1, 4]
QUESTIONS = (
    "<image>\nWhat is it?",
    "Which colour has it?",
    "Compare it with <image> and <image>.",
    "Why?",
    "And now?",
)


ANSWERS = (
    "A picture of three tiles; the largest of all.",
    "Black\n\nand white, mostly.",
    "The first is wide; the second is a pixel; the third is tall.",
    "They were made so.",
)


@pytest.fixture
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    with Runner.open(float32_engine_dir, "cpu") as runner:
        yield runner


class Prompter:
    """A decoder's model that computes as ever, and whose logits then say what is to be said: the
    words of a random model are mostly none that a tokenizer would give back."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tokenizer = runner.tokenizer
        self._left: list[int] = []
        self.num_computed = 0
        model = runner.decoder._model  # type: ignore[attr-defined]
        forward = model.forward

        def say(steps: list[Any]) -> torch.Tensor:
            logits: torch.Tensor = forward(steps)
            self.num_computed += sum(len(step.token_ids) for step in steps)
            logits[:, self._left.pop(0)] = logits.max() + 1
            return logits

        monkeypatch.setattr(model, "forward", say)

    def prepare(self, answer: str) -> int:
        """Returns the number of its tokens."""
        token_ids = self._tokenizer.encode(answer)
        self._left = [*token_ids, self._tokenizer.special_id(IM_END)]
        self.num_computed = 0
        return len(token_ids)


def shown(turns: list[tuple[str, str]], images: Images) -> list[Any]:
    """The turns with their pictures in place, as a client sends them."""
    paths = iter(map(images, PICTURES))
    messages = []
    for role, words in turns:
        first, *others = words.split("<image>")
        parts: list[dict[str, str]] = [{"type": "text", "text": first}]
        for piece in others:
            parts += [
                {"type": "image", "image": str(next(paths))},
                {"type": "text", "text": piece},
            ]
        messages.append({"role": role, "content": parts})
    return messages


@pytest.mark.parametrize("prompt_format", ["hf", "megatron"])
def test_the_fifth_turn_computes_only_its_own_tokens(
    runner: Runner,
    images: Images,
    model_dir: Path,
    prompt_format: PromptFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt is the template filled by hand. What earlier turns computed, pictures and answers
    too, is found again, down to the block that was not full."""
    prompter = Prompter(runner, monkeypatch)
    scheduler = runner.decoder.scheduler  # type: ignore[attr-defined]
    published = PUBLISHED[prompt_format]
    tokenizer = prompts.load_tokenizer(model_dir / "tokenizer.json")
    pad = tokenizer.convert_tokens_to_ids(prompts.PAD)
    vocab_size = runner.engine.checkpoint_config.decoder.vocab_size
    tokens_per_tile = runner.engine.vision_config.tokens_per_tile
    turns: list[tuple[str, str]] = []
    num_known = 0
    for words, answer in zip(QUESTIONS, (*ANSWERS, "Yes."), strict=True):
        turns.append(("user", words))
        request = GenerationRequest.from_messages(shown(turns, images), prompt_format=prompt_format)
        ticket = Ticket(request)
        runner.prepare(ticket)
        num_shown = sum(words.count("<image>") for _, words in turns)
        expected = published(tokenizer, turns, NUM_TILES[:num_shown], tokens_per_tile)
        assert [pad if i >= vocab_size else i for i in ticket.prompt_ids] == expected

        num_answer, before = prompter.prepare(answer), scheduler.num_reused_tokens
        result = runner.generate(request)
        assert (result.text, result.finish_reason) == (answer, "stop")
        num_reused = scheduler.num_reused_tokens - before
        assert num_reused == num_known // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
        assert prompter.num_computed == len(ticket.prompt_ids) - num_reused + num_answer
        num_known = len(ticket.prompt_ids) + num_answer
        turns.append(("assistant", answer))
    assert num_reused > sum(NUM_TILES) * tokens_per_tile
    assert len(ticket.prompt_ids) - num_reused < 2 * TOKENS_PER_BLOCK


def test_the_answer_is_that_of_a_fresh_engine(
    runner: Runner, images: Images, float32_engine_dir: Path
) -> None:
    """Blocks found again change nothing, nor does the way the conversation is said."""
    turns = [("user", QUESTIONS[0]), ("assistant", "A cup."), ("user", QUESTIONS[2])]
    messages = shown(turns, images)
    runner.generate(messages=messages[:1], max_new_tokens=4)
    found = runner.generate(messages=messages, max_new_tokens=NUM_TOKENS)
    assert found.num_tiles == sum(NUM_TILES)
    marked = [{"role": role, "content": words} for role, words in turns]
    paths = list(map(images, PICTURES))
    native = GenerationRequest(
        ("Compare it with ", paths[1], " and ", paths[2], "."),
        history=(
            Message("user", (paths[0], "\nWhat is it?")),
            Message("assistant", ("A cup.",)),
        ),
        max_new_tokens=NUM_TOKENS,
    )
    with Runner.open(float32_engine_dir, "cpu") as fresh:
        others: list[GenerationResult] = [
            fresh.generate(messages=marked, images=paths, max_new_tokens=NUM_TOKENS),
            fresh.generate(native),
        ]
        *_, last = fresh.stream(messages=messages, max_new_tokens=NUM_TOKENS)
    assert last.result is not None
    for other in (*others, last.result):
        assert (other.token_ids, other.grids) == (found.token_ids, found.grids)
        assert other.num_prompt_tokens == found.num_prompt_tokens


def test_a_history_matters(runner: Runner) -> None:
    def asked(*turns: tuple[str, str]) -> list[int]:
        messages = [{"role": role, "content": words} for role, words in turns]
        return runner.generate(messages=messages, max_new_tokens=8).token_ids

    question = ("user", "What?")
    alone = asked(question)
    assert alone == runner.generate("What?", max_new_tokens=8).token_ids
    assert alone != asked(("user", "a"), ("assistant", "b"), question)


def test_images_of_all_turns_count(runner: Runner, images: Images) -> None:
    picture = {"type": "image", "image": str(images("pixel_1x1.png"))}
    user: dict[str, Any] = {"role": "user", "content": [picture, picture]}
    with pytest.raises(UserError, match="4 images, the engine takes 3"):
        runner.generate(messages=[user, {"role": "assistant", "content": "x"}, user])


def test_a_picture_is_encoded_once(
    runner: Runner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many turns show it, and also twice in one; the tables are the same."""
    encode, num_tiles = runner.vision.encode, []

    def count(tiles: torch.Tensor) -> torch.Tensor:
        num_tiles.append(len(tiles))
        return encode(tiles)

    monkeypatch.setattr(runner.vision, "encode", count)

    def table(*names: str) -> torch.Tensor:
        ticket = Ticket(GenerationRequest.images_first("x", tuple(map(images, names))))
        runner.prepare(ticket)
        runner.encode(ticket)
        assert ticket.decoder_request.prompt_table is not None
        return ticket.decoder_request.prompt_table

    first = table(PICTURES[0])
    assert torch.equal(table(PICTURES[0]), first)
    assert num_tiles == [3]
    three = table(PICTURES[1], PICTURES[0], PICTURES[1])
    assert num_tiles == [3, 1]
    rows = runner.engine.vision_config.tokens_per_tile
    assert torch.equal(three[rows : 4 * rows], first)
    assert torch.equal(three[:rows], three[4 * rows :])


def test_the_picture_asked_for_longest_ago_is_forgotten_first() -> None:
    encoded = EncodedPictures(max_bytes=2 * 32)
    rows = {key: torch.full((2, 4), float(key[0])) for key in (b"a", b"b", b"c")}
    for key in (b"a", b"b", b"a", b"c"):
        if encoded.get(key) is None:
            encoded.put(key, rows[key])
    assert encoded.get(b"b") is None
    for key in (b"a", b"c"):
        found = encoded.get(key)
        assert found is not None
        assert torch.equal(found, rows[key])
    encoded.put(b"d", torch.zeros(9, 4))  # more than all
    assert encoded.get(b"d") is None
    assert encoded.get(b"a") is not None
