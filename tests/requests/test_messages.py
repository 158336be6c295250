"""Messages and prompts as every door reads them: what they mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvlm.program.errors import UserError
from runtime.requests.messages import Message, conversation, question
from runtime.requests.request_file import read_messages, request_from_json
from runtime.requests.types import GenerationRequest

A, B, C = Path("a.png"), Path("b.png"), Path("c.png")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("prompt", "images", "content"),
    [
        ("What?", (), ("What?",)),
        ("What?", (A, B), (A, "\n", B, "\n", "What?")),
        ("<image>\nWhat?", (A,), (A, "\nWhat?")),
        ("Is <image> like <image>?", (A, B), ("Is ", A, " like ", B, "?")),
        ("<image><image>", (A, B), (A, B)),
        ("<IMAGE> < image>", (A,), (A, "\n", "<IMAGE> < image>")),
    ],
)
def test_an_image_stands_at_its_mark_and_first_without_one(
    prompt: str, images: tuple[Path, ...], content: tuple[Any, ...]
) -> None:
    assert question(prompt, images) == content
    assert GenerationRequest.images_first(prompt, images).content == content
    assert conversation([user(prompt)], images) == {"content": content, "history": ()}
    line = {"prompt": prompt, "images": list(map(str, images))}
    assert request_from_json(line, Path(), GenerationRequest(())).content == content


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        ("<image>", 0, "the number of <image> in the text is 1 and that of images 0"),
        ("<image>", 2, "is 1 and that of images 2, expected the same"),
        ("<image> <image>", 1, "is 2 and that of images 1"),
    ],
)
def test_marks_and_images_that_differ_in_number_are_refused(
    prompt: str, num_images: int, message: str
) -> None:
    images = [A] * num_images
    with pytest.raises(UserError, match=message):
        question(prompt, images)
    with pytest.raises(UserError, match=message):
        conversation([user(prompt)], images)
    with pytest.raises(UserError, match=message):
        conversation([user(prompt), assistant("x"), user("y")], images)


def test_messages_are_turns_with_images_at_the_marks_of_all_of_them() -> None:
    found = conversation(
        [
            system("Be brief."),
            user("<image>\nWhat?"),
            assistant("An <image> it is."),
            user([text("And "), {"type": "image", "image": "c.png"}, text("<image>?")]),
            assistant([text("One"), text(" more.")]),
            Message("user", ("Native <image> ", C)),
            user("Then <image>?"),
        ],
        [A, B],
    )
    assert found == {
        "system": "Be brief.",
        "history": (
            Message("user", (A, "\nWhat?")),
            Message("assistant", ("An <image> it is.",)),
            Message("user", ("And ", C, "<image>?")),
            Message("assistant", ("One", " more.")),
            Message("user", ("Native <image> ", C)),
        ),
        "content": ("Then ", B, "?"),
    }


def test_a_request_of_messages_is_a_request_with_a_history() -> None:
    request = GenerationRequest.from_messages(
        [user("a"), assistant("b"), user("<image>c")], "a.png", temperature=0.5, system="s"
    )
    expected = GenerationRequest.images_first("x", temperature=0.5, system="s").sampling
    assert request.sampling == expected
    assert (request.system, request.content, request.num_images) == ("s", (A, "c"), 1)
    assert request.history == (Message("user", ("a",)), Message("assistant", ("b",)))
    assert [turn.role for turn in request.turns] == ["user", "assistant", "user"]
    shown = user([{"type": "image", "image": Image.new("RGB", (2, 2))}])
    assert GenerationRequest.of(messages=[shown]).num_images == 1


BAD: list[tuple[Any, str]] = [
    (None, "messages is None, expected a list"),
    ("hi", "messages is 'hi', expected a list"),
    ({"role": "user"}, "messages is {'role': 'user'}, expected a list"),
    ([], "messages is empty, expected at least"),
    (["hi"], "message 1 is 'hi', expected {\"role\""),
    ([user("a"), assistant("b")], "the last message is the assistant's, expected the user's"),
    ([system("a")], "the last message is the system's"),
    ([user("a"), system("b"), user("c")], "message 2 is a system message; only the first may be"),
    ([system("a"), system("b"), user("c")], "message 2 is a system message"),
    ([{"role": "tool", "content": "a"}], "message 1 has role 'tool', expected system, user or"),
    ([{"content": "a"}], "message 1 has role None, expected"),
    ([user("a"), {"role": ["user"], "content": "a"}], "message 2 has role ['user']"),
    ([{**user("a"), "name": "x"}], "message 1 has an unknown field 'name', expected role and"),
    ([{"role": "user"}], "message 1 content is None, expected a string or a list of parts"),
    ([user(3)], "message 1 content is 3"),
    ([user(["a"])], "message 1 content part 'a' is neither"),
    ([user([{"type": "video", "video": "x"}])], "message 1 content part {'type': 'video'"),
    ([user([{"type": "image", "image": 3}])], "message 1 content part"),
    (
        [user("a"), assistant([{"type": "image", "image": "a.png"}]), user("b")],
        "the assistant's message holds an image; only the user shows images",
    ),
    (
        [system([{"type": "image", "image": "a.png"}]), user("b")],
        "the system's message holds an image",
    ),
    ([user([{"type": "image", "image": "https://x/y.png"}])], "nothing is fetched"),
]


@pytest.mark.parametrize(("messages", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_no_conversation_is_refused_in_a_line(
    messages: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        conversation(messages)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if messages is not None:
        with pytest.raises(UserError) as error:
            request_from_json({"messages": messages}, Path(), GenerationRequest(()))
        assert message in str(error.value)
    (tmp_path / "m.json").write_text(json.dumps(messages))
    with pytest.raises(UserError) as error:
        read_messages(tmp_path / "m.json", (), has_system=False)
    assert str(error.value).startswith(f"--messages {tmp_path / 'm.json'}: ")


def test_what_stands_beside_messages_is_refused() -> None:
    turns = [system("s"), user("a")]
    for line, message in (
        ({"messages": turns, "prompt": "p"}, "prompt stands beside messages"),
        ({"messages": turns, "system": "t"}, "system stands beside messages with a system"),
        ({"messages": turns, "images": ["a.png"] * 2}, None),
        ({"messages": [user([text("a")])], "images": ["a.png"]}, "is 0 and that of images 1"),
    ):
        if message is None:  # a single question has its images first
            assert request_from_json(line, Path(), GenerationRequest(())).num_images == 2
            continue
        with pytest.raises(UserError, match=message):
            request_from_json(line, Path(), GenerationRequest(()))
    with pytest.raises(UserError, match="messages is given beside a question"):
        GenerationRequest.of("p", messages=turns)
    with pytest.raises(UserError, match="system stands beside messages"):
        GenerationRequest.of(messages=turns, system="t")
    with pytest.raises(UserError, match="no setting 'temprature'"):
        GenerationRequest.of(messages=turns, temprature=1)
    with pytest.raises(UserError, match="history holds Messages of the user and the assistant"):
        GenerationRequest(("a",), history=(Message("system", ("s",)),))
    with pytest.raises(UserError, match="role is 'tool', expected system"):
        Message("tool", ("a",))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["{", "\ud800".encode("utf-8", "surrogatepass"), b"\xff"])
def test_a_file_of_messages_that_is_no_json_is_refused(
    content: str | bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"m\.json is not JSON"):
        read_messages(path, (), has_system=False)
    with pytest.raises(UserError, match=r"none.json cannot be read"):
        read_messages(tmp_path / "none.json", (), has_system=False)


def test_a_file_of_messages_names_images_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps([user([{"type": "image", "image": "a.png"}, text("?")])]))
    assert read_messages(path, (), has_system=True)["content"] == (tmp_path / "a.png", "?")
