"""Prompt token ids against Qwen's real vocabulary: tiktoken, Hugging Face and printed ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm.inputs.prompt import (
    ImageSlot,
    PromptFormat,
    PromptPart,
    build_prompt,
    images_first,
    tile_tags,
)
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.program.errors import UserError
from tests.reference import prompts, qwen_vocabulary

VOCAB_SIZE = 152064
TOKENS_PER_TILE = 256
IM_START, IM_END, VISION_PAD = 151644, 151645, 151654


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    qwen_vocabulary.write_tokenizer_json(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def published_tokenizer(tokenizer_dir: Path) -> object:
    return prompts.load_tokenizer(tokenizer_dir / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


def as_published(token_ids: list[int]) -> list[int]:
    """Virtual ids as the published code writes them: the id of <|vision_pad|>."""
    return [VISION_PAD if token_id >= VOCAB_SIZE else token_id for token_id in token_ids]


@pytest.mark.parametrize("num_tiles", [[], [1], [7], [1, 7, 3], [12]], ids=str)
@pytest.mark.parametrize("question", ["What is it?", "\nLies 日本語: café\n\n>", "<tile_1> x"])
@pytest.mark.parametrize(
    ("prompt_format", "published"),
    [("hf", prompts.hugging_face), ("megatron", prompts.megatron)],
)
def test_token_ids_equal_the_published_template_tokenised_as_one_string(
    prompt_format: PromptFormat,
    published: object,
    question: str,
    num_tiles: list[int],
    tokenizer: Tokenizer,
    published_tokenizer: object,
) -> None:
    assert callable(published)
    expected = published(published_tokenizer, question, num_tiles, TOKENS_PER_TILE)
    prompt = build_prompt(
        images_first(num_tiles, question),
        tokenizer,
        tokens_per_tile=TOKENS_PER_TILE,
        vocab_size=VOCAB_SIZE,
        prompt_format=prompt_format,
    )
    assert as_published(prompt.token_ids) == expected
    virtual = [token_id for token_id in prompt.token_ids if token_id >= VOCAB_SIZE]
    assert virtual == list(range(VOCAB_SIZE, VOCAB_SIZE + sum(num_tiles) * TOKENS_PER_TILE))
    assert prompt.num_virtual_tokens == len(virtual)


@pytest.mark.parametrize(
    ("prompt_format", "published"),
    [("hf", prompts.hugging_face_conversation), ("megatron", prompts.megatron_conversation)],
)
def test_a_conversation_of_five_turns_is_the_published_template_filled_by_hand(
    prompt_format: PromptFormat,
    published: Callable[..., list[int]],
    tokenizer: Tokenizer,
    published_tokenizer: object,
) -> None:
    """Three pictures in two turns, answers that begin and end with white space, an empty one."""
    turns = [
        ("user", "<image>\nWhat is it?"),
        ("assistant", " A cup.\n"),
        ("user", "And? 日本語"),
        ("assistant", "\nTwo\n\n"),
        ("user", "First <image>, then <image>."),
        ("assistant", ""),
        ("user", "Well?"),
        ("assistant", "No <tile_1> there."),
        ("user", "Which is larger?"),
    ]
    num_tiles = [7, 1, 3]
    expected = published(published_tokenizer, turns, num_tiles, TOKENS_PER_TILE, "Be brief.")
    slots = map(ImageSlot, num_tiles)

    def parts(words: str) -> list[PromptPart]:
        first, *others = words.split("<image>")
        return [first, *(part for words in others for part in (next(slots), words))]

    *history, (_, question) = [(role, parts(words)) for role, words in turns]
    prompt = build_prompt(
        question,
        tokenizer,
        tokens_per_tile=TOKENS_PER_TILE,
        vocab_size=VOCAB_SIZE,
        system="Be brief.",
        history=history,  # type: ignore[arg-type]
        prompt_format=prompt_format,
    )
    assert as_published(prompt.token_ids) == expected
    virtual = [token_id for token_id in prompt.token_ids if token_id >= VOCAB_SIZE]
    assert virtual == list(range(VOCAB_SIZE, VOCAB_SIZE + 11 * TOKENS_PER_TILE))


def test_the_hf_boundary_merges_image_and_tile_tags() -> None:
    """`<Image><tile_1>` is 46465 '<Image', 1784 '><', ...: ids printed in vLLM pull 12553."""
    assert qwen_vocabulary.encode_plain("<Image><tile_1>") == [46465, 1784, 21094, 62, 16, 29]


@pytest.mark.parametrize(
    ("prompt_format", "opening"),
    [
        # <|im_start|> user \n <Image ><  tile _ 1 >       joined: one token for '><'
        ("hf", [151644, 872, 198, 46465, 1784, 21094, 62, 16, 29]),
        # <|im_start|> user \n <Image > < tile _ 1 >       tag apart: '>' then '<'
        ("megatron", [151644, 872, 198, 46465, 29, 27, 21094, 62, 16, 29]),
    ],
)
def test_goldens_of_an_image_of_two_tiles_and_its_thumbnail(
    prompt_format: PromptFormat, opening: list[int], tokenizer: Tokenizer
) -> None:
    prompt = build_prompt(
        images_first([3], "Hi"),
        tokenizer,
        tokens_per_tile=2,
        vocab_size=VOCAB_SIZE,
        prompt_format=prompt_format,
    )
    newline = [198] if prompt_format == "megatron" else []
    assert prompt.token_ids == [
        *(151644, 8948, 198, 16141, 279, 4755, 13, 151645, *newline),  # Answer the questions.
        *(*opening, 152064, 152065),
        *(27, 21094, 62, 17, 29, 152066, 152067),  # <tile_2>
        *(27, 21094, 19296, 37824, 29, 152068, 152069),  # <tile_global_thumbnail>
        *(522, 1906, 397, 13048, 151645, *newline),  # </Image>\nHi
        *(151644, 77091, 198),  # <|im_start|>assistant\n
    ]


@pytest.mark.parametrize("prompt_format", ["hf", "megatron"])
def test_a_single_tile_has_only_the_thumbnail_tag(
    prompt_format: PromptFormat, tokenizer: Tokenizer
) -> None:
    assert tile_tags(1) == ["<tile_global_thumbnail>"]
    prompt = build_prompt(
        [ImageSlot(1)],
        tokenizer,
        tokens_per_tile=1,
        vocab_size=VOCAB_SIZE,
        prompt_format=prompt_format,
    )
    assert tokenizer.decode(prompt.token_ids).count("<tile_") == 1


def test_images_stand_in_line_where_the_parts_put_them(tokenizer: Tokenizer) -> None:
    prompt = build_prompt(
        ["First ", ImageSlot(1), " then ", ImageSlot(1), "."],
        tokenizer,
        tokens_per_tile=1,
        vocab_size=VOCAB_SIZE,
    )
    image = "<Image><tile_global_thumbnail></Image>"
    assert f"user\nFirst {image} then {image}." in tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    "text",
    [
        *("plain", "  spaces  ", "a\n\nb\r\n", "日本語とcafé", "e\u0301 → é (NFC)", "🙂👍🏽"),
        *("x = [1, 2]  # code", "12345", "I'm we'll", "<|im_end|>", "<tool_call>{}</tool_call>"),
        *("<|vision_pad|><|image_pad|>", "<image>", "\u200b\ufeff", "a" * 500),
    ],
)
def test_plain_text_equals_tiktoken_with_special_tokens_off(
    text: str, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(text)
    assert token_ids == qwen_vocabulary.encode_plain(text)
    assert max(token_ids) < 151643


def test_decoding_leaves_out_special_tokens_and_padding_ids(tokenizer: Tokenizer) -> None:
    token_ids = [IM_START, *tokenizer.encode("Käse 🧀"), IM_END, 152063]
    assert tokenizer.decode(token_ids) == "Käse 🧀"
    assert tokenizer.decode([151657]) == "<tool_call>", "an added token that is not special"


def test_text_that_is_not_unicode_is_refused_in_one_sentence(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        build_prompt(["bad \udcff"], tokenizer, tokens_per_tile=1, vocab_size=VOCAB_SIZE)
