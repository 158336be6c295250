"""Token ids to text as they come, on the tiny model's byte-level tokenizer."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm.inputs.tokenizer import Detokenizer, Tokenizer
from runtime.requests.text_stream import TextStream

# Emoji with joiner, modifier and flag, CJK, combining accents, right to left, astral letters.
TEXTS = {
    "ascii": "Read the number.",
    "emoji": "🦊👩🏽‍🚀🇨🇭!",
    "cjk": "图片里有什么？猫。",
    "combining": "e\u0301a\u0308\u0323 \u0915\u094d\u0937",
    "mixed": "שלום 𝔘nicode ½ €\x00\ufffd",
}


PushText = Callable[..., tuple[list[str], TextStream]]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


@pytest.fixture(scope="module")
def id_of_byte(tokenizer: Tokenizer) -> list[int]:
    """The id of each byte's own token."""
    by_bytes = {tokenizer.bytes_of(i): i for i in range(tokenizer.num_tokens)}
    return [by_bytes[bytes([byte])] for byte in range(256)]


@pytest.fixture(scope="module")
def special_ids(model_dir: Path) -> list[int]:
    added = json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"]
    return [token["id"] for token in added if token["special"]]


def oracle(text: str, stop: tuple[str, ...]) -> str:
    """Character by character: the text ends before the first stop string that becomes whole."""
    for end in range(1, len(text) + 1):
        ends = [end - len(s) for s in stop if s and text[:end].endswith(s)]
        if ends:
            return text[: min(ends)]
    return text


def stream_all(stream: TextStream, token_ids: list[int]) -> list[str]:
    """Every delta, checked never to be taken back."""
    deltas = []
    for token_id in token_ids:
        deltas.append(stream.push(token_id))
        assert stream.text == "".join(deltas)
    deltas.append(stream.finish())
    assert stream.text == "".join(deltas)
    return deltas


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_comes_back_from_its_ids(tokenizer: Tokenizer, name: str) -> None:
    """In composed form: Qwen2's tokenizer applies NFC first."""
    ids = tokenizer.encode(TEXTS[name])
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", TEXTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_characters_split_over_one_token_a_byte_come_out_whole(
    tokenizer: Tokenizer, id_of_byte: list[int], name: str
) -> None:
    text = TEXTS[name]
    stream = TextStream(tokenizer)
    deltas = stream_all(stream, [id_of_byte[byte] for byte in text.encode()])
    assert [delta for delta in deltas if delta] == list(text)
    assert stream.text == text


def test_a_character_is_handed_out_with_its_last_byte(
    tokenizer: Tokenizer, id_of_byte: list[int]
) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(id_of_byte[byte]) for byte in "🦊".encode()] == ["", "", "", "🦊"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80",
        b"a\xffb",
        b"\xe4\xb8",  # cut short
        b"\xf0\x9f\xa6",
        b"\xf0\x9fA",
        b"\xc0\xaf",  # overlong
        b"\xed\xa0\x80",  # surrogate
        b"\xf4\x90\x80\x80",  # above U+10FFFF
        b"ok\xe2\x82\xac\xe2\x82",
    ],
    ids=repr,
)
def test_invalid_bytes_become_what_python_makes_of_them(
    tokenizer: Tokenizer, id_of_byte: list[int], data: bytes
) -> None:
    expected = data.decode("utf-8", "replace")
    assert "\ufffd" in expected
    assert tokenizer.decode([id_of_byte[byte] for byte in data]) == expected


def test_random_bytes_in_random_tokens_decode_as_python_decodes_them(
    tokenizer: Tokenizer,
) -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.num_tokens) for _ in range(rng.randint(0, 30))]
        data = b"".join(map(tokenizer.bytes_of, ids))
        stream = TextStream(tokenizer)
        assert "".join(stream_all(stream, ids)) == data.decode("utf-8", "replace")


def test_special_tokens_and_padding_ids_are_invisible_even_within_a_character(
    tokenizer: Tokenizer, id_of_byte: list[int], special_ids: list[int]
) -> None:
    assert len(special_ids) >= 14
    invisible = [*special_ids, tokenizer.num_tokens, 511]
    ids = [i for byte in "a🦊".encode() for i in (id_of_byte[byte], *invisible)]
    assert tokenizer.decode(ids) == "a🦊"
    assert tokenizer.decode(invisible) == ""


def test_tokens_that_are_added_but_not_special_are_visible(
    tokenizer: Tokenizer, model_dir: Path
) -> None:
    added = json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"]
    visible = [token for token in added if not token["special"]]
    assert visible
    for token in visible:
        assert tokenizer.decode([token["id"]]) == token["content"]


def test_flush_hands_out_nothing_when_every_character_was_whole(
    tokenizer: Tokenizer, id_of_byte: list[int]
) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(id_of_byte[byte]) for byte in "é".encode()] == ["", "é"]
    assert detokenizer.flush() == ""


class TestStopStrings:
    @pytest.fixture
    def push_text(self, tokenizer: Tokenizer, id_of_byte: list[int]):
        """(deltas, stream) of a text given one token a byte."""

        def push(text: str, *stop: str) -> tuple[list[str], TextStream]:
            stream = TextStream(tokenizer, stop)
            return stream_all(stream, [id_of_byte[b] for b in text.encode()]), stream

        return push

    @pytest.mark.parametrize("stop", ["END", "🦊", "D o", "\n\n"])
    def test_text_ends_before_a_stop_string_split_over_tokens(
        self, push_text: PushText, stop: str
    ) -> None:
        deltas, stream = push_text(f"one{stop}two{stop}", stop)
        assert "".join(deltas) == stream.text == "one"
        assert stream.stopped

    def test_text_ends_before_a_stop_string_inside_one_token(
        self, tokenizer: Tokenizer, id_of_byte: list[int]
    ) -> None:
        """The stop string neither begins nor ends with the token."""
        token_id = max(range(400), key=lambda i: len(tokenizer.bytes_of(i)))
        text = tokenizer.bytes_of(token_id).decode()
        assert len(text) >= 4
        stream = TextStream(tokenizer, (text[2:-1],))
        assert stream.push(id_of_byte[ord("a")]) == "a"
        assert stream.push(token_id) == text[:2]
        assert stream.stopped
        assert stream.push(token_id) == "", "nothing follows the end"
        assert stream.finish() == ""
        assert stream.text == "a" + text[:2]

    def test_what_may_begin_a_stop_string_waits_and_comes_when_it_does_not(
        self, push_text: PushText
    ) -> None:
        deltas, stream = push_text("aENaE", "END")
        assert deltas == ["a", "", "", "ENa", "", "E"]
        assert not stream.stopped

    def test_what_was_held_back_is_released_at_the_end(self, push_text: PushText) -> None:
        deltas, stream = push_text("xEN", "END")
        assert deltas == ["x", "", "", "EN"]
        assert stream.text == "xEN"
        assert not stream.stopped

    def test_a_stop_string_that_begins_within_a_false_start_is_found(
        self, push_text: PushText
    ) -> None:
        assert push_text("aabaabaac", "aabaac")[1].text == "aab"
        assert push_text("ENEND", "END")[1].text == "EN"

    def test_of_overlapping_stop_strings_the_first_to_be_whole_ends_the_text(
        self, push_text: PushText
    ) -> None:
        assert push_text("xabcdy", "abcd", "bc")[1].text == "xa"
        assert push_text("xabcdy", "abc", "bc")[1].text == "x"  # both at once: the longer
        assert push_text("xabcey", "abcd", "c")[1].text == "xab"

    def test_a_stop_string_at_the_very_beginning_gives_empty_text(
        self, push_text: PushText
    ) -> None:
        assert push_text("END", "END")[1].text == ""

    def test_an_empty_stop_string_stops_nothing(self, push_text: PushText) -> None:
        deltas, stream = push_text("ab", "")
        assert deltas == ["a", "b", ""]
        assert not stream.stopped

    def test_a_character_cut_short_can_complete_a_stop_string_at_the_end(
        self, tokenizer: Tokenizer, id_of_byte: list[int]
    ) -> None:
        stream = TextStream(tokenizer, ("a\ufffd",))
        assert [stream.push(id_of_byte[b]) for b in b"xa\xf0"] == ["x", "", ""]
        assert stream.finish() == ""
        assert stream.stopped
        assert stream.text == "x"

    @pytest.mark.parametrize("seed", range(4))
    def test_random_texts_and_stops_one_token_a_byte_agree_with_the_oracle(
        self, push_text: PushText, seed: int
    ) -> None:
        rng = random.Random(seed)
        num_stopped = 0
        for _ in range(200):
            text = "".join(rng.choices("ab猫", k=rng.randint(0, 12)))
            stop = tuple(
                "".join(rng.choices("ab猫", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))
            )
            stream = push_text(text, *stop)[1]
            expected = oracle(text, stop)
            assert (stream.text, stream.stopped) == (expected, expected != text), (text, stop)
            num_stopped += stream.stopped
        assert 50 < num_stopped < 190

    def test_the_text_does_not_depend_on_how_it_is_cut_into_tokens(
        self, tokenizer: Tokenizer, id_of_byte: list[int]
    ) -> None:
        """Merged tokens of several characters end the text where single bytes do."""
        rng = random.Random(0)
        words = [bytes_ for i in range(400) if len(bytes_ := tokenizer.bytes_of(i)) >= 2]
        ids = {tokenizer.bytes_of(i): i for i in range(400)}
        for _ in range(500):
            chosen = rng.choices(words, k=rng.randint(1, 4))
            text = b"".join(chosen).decode()
            cuts = [sorted(rng.sample(range(len(text) + 1), 2)) for _ in range(3)]
            stop = tuple(text[start:end] for start, end in cuts)
            stream = TextStream(tokenizer, stop)
            stream_all(stream, [ids[word] for word in chosen])
            assert (stream.text, stream.stopped) == (oracle(text, stop), True), (chosen, stop)
