"""Chat completions and what stands beside them: answers, streams, fields, refusals."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from runtime.requests.messages import Message
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from tests.support.asgi import Client, Reply
from tests.support.asking import Images

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions

CHAT = "/v1/chat/completions"
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "openai_bodies.json").read_text())
Body = dict[str, Any]


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        yield runner


@pytest.fixture
def client(runner: Runner) -> Iterator[Client]:
    server = Server(runner)
    door = Door(DoorOptions(models=("nvlm-d", "gpt-4o")))
    door.open(server)
    with Client(application(door)) as client:
        yield client
    server.close()
    door.close()


def alone(runner: Runner, request: GenerationRequest) -> str:
    """What the library answers, while no server has the runner."""
    return runner.generate(request).text


def url_of(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(path: Path, **more: str) -> Body:
    return {"type": "image_url", "image_url": {"url": url_of(path), **more}}


def text(words: str) -> Body:
    return {"type": "text", "text": words}


def user(*parts: Body | str) -> Body:
    content = parts[0] if isinstance(parts[0], str) else list(parts)
    return {"role": "user", "content": content}


def chat(*messages: Body, **fields: Any) -> Body:
    return {"model": "nvlm-d", "max_tokens": 6, "messages": list(messages), **fields}


def schema_format(schema: Body) -> Body:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


JSON_OBJECT: Body = {"type": "json_object"}


def content(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(reply.json()["choices"][0]["message"]["content"])


def counts_of(answer: Body) -> Body:
    """Its usage, without what depends on the requests before it."""
    return {name: each for name, each in answer["usage"].items() if name.endswith("_tokens")}


def refused(client: Client, body: Any, param: str | None, *fragments: str) -> None:
    reply = client.post(CHAT, body)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param, reply.error
    assert reply.error["type"] == "invalid_request_error"
    for fragment in fragments:
        assert fragment in reply.error["message"], reply.error


def test_an_answer_is_that_of_the_library(runner: Runner, images: Images) -> None:
    one, two = images("landscape_800x450.png"), images("portrait_400x1000.png")
    cases = [
        (chat(user("Hello")), GenerationRequest.images_first("Hello", max_new_tokens=6)),
        (
            chat(user(picture(one), text("What is it?"))),
            GenerationRequest.images_first("What is it?", one, max_new_tokens=6),
        ),
        (
            chat(user(picture(one), picture(two), text("And now?"))),
            GenerationRequest.images_first("And now?", (one, two), max_new_tokens=6),
        ),
        (
            chat(user(text("Before"), picture(one), text("after"))),
            GenerationRequest(("Before", "\n", one, "\n", "after"), max_new_tokens=6),
        ),
        (chat(user(picture(two))), GenerationRequest((two,), max_new_tokens=6)),
        (
            chat(
                {"role": "developer", "content": "Be short."},
                user("One <image> mark"),
                {"role": "assistant", "content": [text("Yes")], "tool_calls": None},
                user(picture(one), text("Two")),
            ),
            GenerationRequest(
                (one, "\n", "Two"),
                system="Be short.",
                history=(Message("user", ("One <image> mark",)), Message("assistant", ("Yes",))),
                max_new_tokens=6,
            ),
        ),
    ]
    expected = [runner.generate(request) for _, request in cases]
    server = Server(runner)
    door = Door(DoorOptions())
    door.open(server)
    with Client(application(door)) as client:
        for (body, _), result in zip(cases, expected, strict=True):
            reply = client.post(CHAT, body)
            assert content(reply) == result.text
            assert reply.json()["choices"][0]["finish_reason"] == result.finish_reason
            assert reply.json()["usage"] == {
                "prompt_tokens": result.num_prompt_tokens,
                "completion_tokens": result.num_tokens,
                "total_tokens": result.num_prompt_tokens + result.num_tokens,
                "prompt_tokens_details": {
                    "cached_tokens": (result.num_prompt_tokens - 1) // 32 * 32
                },
            }
    server.close()


def test_a_stream_is_the_answer_in_pieces(client: Client, images: Images) -> None:
    asked = user(picture(images("landscape_800x450.png")), text("What is it?"))
    whole = client.post(CHAT, chat(asked, max_tokens=12)).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = client.post(CHAT, chat(asked, max_tokens=12, stream=True, stream_options=options))
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = reply.events()
    assert last["choices"] == []
    assert counts_of(last) == counts_of(whole)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in (*chunks, last)}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    said = "".join(delta["content"] for delta in deltas)
    assert said == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_usage_is_reported_only_where_it_is_asked_for(client: Client) -> None:
    chunks = client.post(CHAT, chat(user("Hello"), stream=True)).events()
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    refused(client, chat(user("Hi"), stream_options={"include_usage": True}), "stream_options")


def test_low_detail_is_the_thumbnail_alone(client: Client, images: Images) -> None:
    def num_tokens(**more: str) -> int:
        asked = user(picture(images("landscape_800x450.png"), **more), text("What?"))
        return int(client.post(CHAT, chat(asked)).json()["usage"]["prompt_tokens"])

    counted = client.post(
        "/tokenize",
        {
            "messages": [user(picture(images("landscape_800x450.png")), text("What?"))],
            "mm_processor_kwargs": {"max_num_tiles": 1},
        },
    ).json()
    assert num_tokens() == num_tokens(detail="high") == num_tokens(detail="auto")
    assert num_tokens(detail="low") == counted["count"] < num_tokens()


def test_the_fields_reach_the_runtime(client: Client) -> None:
    """The likeliest answer, its beginning, and one that is drawn."""
    whole = content(
        client.post(CHAT, chat(user("Hello"), max_tokens=None, max_completion_tokens=8))
    )
    again = chat(user("Hello"), max_tokens=8, temperature=0, top_p=1.0, top_k=-1, n=1, stop=[])
    assert content(client.post(CHAT, again)) == whole
    stopped = client.post(CHAT, chat(user("Hello"), max_tokens=8, stop=whole[2])).json()
    assert stopped["choices"][0]["message"]["content"] == whole[: whole.index(whole[2])]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    drawn = chat(user("Hello"), max_tokens=8, temperature=5, seed=3)
    assert content(client.post(CHAT, drawn)) == content(client.post(CHAT, drawn)) != whole


@pytest.mark.parametrize(
    ("fields", "param", "fragment"),
    [
        ({"temperature": -1}, "temperature", "0 (greedy) to 100"),
        ({"temperature": "hot"}, "temperature", "expected number"),
        ({"temperature": True}, "temperature", "expected number"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 1.5}, "max_tokens", "expected integer"),
        ({"max_completion_tokens": 7}, "max_tokens", "and max_completion_tokens 7"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"seed": -1}, "seed", "expected 0 to 2^64 - 1"),
        ({"stop": ["x"] * 65}, "stop", "64 at most"),
        ({"stop": [1]}, "stop", "a list of strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "stop_token_ids has token id 1000000"),
        ({"stream": "yes"}, "stream", "expected boolean"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, None, "include_usage is 1"),
        ({"priority": "high"}, "priority", "expected integer"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"n": 2}, "n", "the sampling is greedy"),
        ({"n": 500, "temperature": 1}, "n", "max_batch_size"),
        ({"min_tokens": 9}, "min_tokens", "min_tokens is 9 and max_tokens 6"),
        ({"min_tokens": 10**5, "max_tokens": 10**6}, "min_tokens", "the engine has room for"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "token id 999999"),
        ({"response_format": JSON_OBJECT, "stop": "x"}, "stop", "would cut"),
        ({"response_format": JSON_OBJECT, "ignore_eos": True}, "ignore_eos", "ends where it"),
        ({"response_format": JSON_OBJECT, "guided_regex": "x"}, None, "are both given"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex cannot be followed"),
        (
            {"response_format": schema_format({"type": "string", "format": "hostess"})},
            "response_format",
            "the format hostess",
        ),
        ({"messages": [{"role": "user", "content": "a b " * 9000}]}, "messages", "the prompt has"),
        ({"tools": [{"type": "function"}]}, "tools", "this server has no tools"),
        ({"cache_salt": "x"}, "cache_salt", "has no cache_salt"),
        ({"best_of": 2}, "best_of", "has no best_of"),
        ({"suffix": "x"}, "suffix", "has no suffix"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
            "response_format.json_schema.schema",
            "schema is True, expected an object",
        ),
        ({"bad_words": ["\ud800"]}, "bad_words", "bad_words is not valid Unicode"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs", "regex is not valid"),
        ({"structured_outputs": {"yaml": "x"}}, "structured_outputs.yaml", "expected one of"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs", "one of them"),
        ({"mm_processor_kwargs": {"size": 1}}, "mm_processor_kwargs.size", "max_num_tiles"),
        ({"mm_processor_kwargs": {"max_num_tiles": 0}}, None, "1 or more"),
        ({"mm_processor_kwargs": {"max_num_tiles": 99}}, None, "max_num_tiles is 99"),
        ({"images": ["aGk="]}, "images", "a part of a message"),
        ({"model": 5}, "model", "expected string"),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(
    client: Client, fields: Body, param: str | None, fragment: str
) -> None:
    reply = client.post(CHAT, {**chat(user("Hello")), **fields})
    assert reply.status == 400, reply.body
    assert fragment in reply.error["message"], reply.error
    if param is not None:
        assert reply.error["param"] == param


@pytest.mark.parametrize(
    ("messages", "param", "fragment"),
    [
        (None, "messages", "expected a list"),
        ([], "messages", "empty"),
        (["hi"], "messages[0]", "expected an object"),
        ([{"role": "tool", "content": "x"}], "messages[0].role", "expected system, user"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "expected system, user"),
        ([{"role": "user"}], "messages[0].content", "a string or a list"),
        ([{"role": "user", "content": []}], "messages[0].content", "a string or a list"),
        ([{"role": "assistant", "content": "x"}], "messages", "expected the user's"),
        ([user("x"), {"role": "system", "content": "y"}, user("z")], "messages", "only the first"),
        ([user({"type": "video_url"})], "messages[0].content[0].type", "text or image_url"),
        ([user({"type": "text"})], "messages[0].content[0]", "a part is neither"),
        ([user({"text": "x"})], "messages[0].content[0]", "a part is neither"),
        ([{**user("x"), "images": ["y"]}], "messages[0].images", "image_url"),
        ([{**user("x"), "tool_calls": [{}]}], "messages[0].tool_calls", "nothing this server"),
        ([user("\ud800")], "messages[0].content", "half a character"),
        (
            [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})],
            "messages[0].content[0].image_url",
            "reads no files",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})],
            "messages[0].content[0].image_url",
            "reads no files",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})],
            "messages[0].content[0].image_url",
            "--allowed_media_domain",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAA?"}})],
            "messages[0].content[0].image_url",
            "not base64",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}})],
            "messages[0].content[0].image_url",
            "none of PNG, JPEG",
        ),
        (
            [
                user(
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="},
                    }
                )
            ],
            "messages[0].content[0].image_url",
            "not a whole image",
        ),
        (
            [
                user(
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64,JVBERi0xLjQ="},
                    }
                )
            ],
            "messages[0].content[0].image_url",
            "none of PNG, JPEG",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "data:,", "detail": "best"}})],
            "messages[0].content[0].image_url.detail",
            "low, high or auto",
        ),
    ],
)
def test_wrong_messages_are_refused_by_their_place(
    client: Client, messages: Any, param: str, fragment: str
) -> None:
    refused(client, {"messages": messages, "max_tokens": 3}, param, fragment)


def test_more_pictures_than_the_engine_takes_are_refused(client: Client, images: Images) -> None:
    shown = [picture(images("pixel_1x1.png"))] * 4
    refused(client, chat(user(*shown)), "messages", "4 images")


def test_what_is_no_json_object_is_refused(client: Client) -> None:
    for data, message in (
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "no JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b"\xff", "send it as UTF-8"),
        (b'{"a": "\xe9"}', "byte 7 is no UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ):
        reply = client.post(CHAT, data)
        assert reply.status == 400, data[:20]
        assert reply.error["message"].startswith("the body "), reply.error
        assert message in reply.error["message"], reply.error


def test_unknown_fields_are_ignored_and_reported(client: Client) -> None:
    reply = client.post(CHAT, chat(user("Hello"), frobnicate=1, user="me"))
    assert reply.status == 200
    assert reply.headers["x-ignored-fields"] == "frobnicate"
    options = {"includes_usage": True, "include_obfuscation": False}
    reply = client.post(CHAT, chat(user("Hello"), stream=True, stream_options=options))
    assert reply.headers["x-ignored-fields"] == "stream_options.includes_usage"


def test_another_model_is_not_found(client: Client) -> None:
    assert client.post(CHAT, chat(user("Hello"), model="gpt-4o")).json()["model"] == "gpt-4o"
    reply = client.post(CHAT, chat(user("Hello"), model="llama"))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_bodies_of_clients_are_answered(client: Client, name: str) -> None:
    """vllm bench serve, LangChain, aiperf, lmms-eval: as they send them."""
    recorded = RECORDED[name]
    reply = client.post(recorded["path"], recorded["body"])
    assert reply.status == 200, reply.body
    assert "x-ignored-fields" not in reply.headers
    if recorded["body"].get("stream"):
        assert reply.events()


def test_text_is_continued_without_a_template(client: Client, runner: Runner) -> None:
    body = {"prompt": ["Hello", "Good <image> day"], "max_tokens": 4}
    reply = client.post("/v1/completions", body)
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    ids = [client.post("/tokenize", {"prompt": each}).json()["tokens"] for each in body["prompt"]]
    assert ids == [runner.tokenizer.encode(each) for each in body["prompt"]]
    assert reply.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    *chunks, last = client.post(
        "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    ).events()
    for choice in choices:
        said = [
            each["text"]
            for chunk in chunks
            for each in chunk["choices"]
            if each["index"] == choice["index"]
        ]
        assert "".join(said) == choice["text"]
    assert counts_of(last) == counts_of(reply.json())
    for wrong in ("", [], [""], None, [1, 2], {"text": "x"}):
        assert client.post("/v1/completions", {"prompt": wrong}).error["param"] == "prompt"


def test_tokens_become_text_again(client: Client) -> None:
    body = client.post("/tokenize", {"prompt": "Grüße, 世界", "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    back = client.post("/detokenize", {"tokens": body["tokens"]}).json()
    assert back == {"prompt": "Grüße, 世界"}
    assert client.post("/detokenize", {"tokens": [-1]}).error["param"] == "tokens"
    assert client.post("/tokenize", {}).status == 400


def test_special_tokens_are_shown_by_name(client: Client, runner: Runner, images: Images) -> None:
    asked = [user(picture(images("pixel_1x1.png")), text("Grüße"))]
    body = {"prompt": None, "messages": asked, "return_token_strs": True}
    found = client.post("/tokenize", body).json()
    told = client.post("/detokenize", {"tokens": found["tokens"]}).json()["prompt"]
    assert told.startswith("<|im_start|>system\n")
    assert told.endswith("Grüße<|im_end|><|im_start|>assistant\n")
    assert found["token_strs"][0] == "<|im_start|>"
    vocab_size = runner.engine.checkpoint_config.decoder.vocab_size
    assert max(found["tokens"]) > vocab_size, "the picture's places have no text"
    for token_id in (vocab_size + runner.engine.limits.max_seq_len, 10**30):
        reply = client.post("/detokenize", {"tokens": [token_id]})
        assert f"expected 0 to {vocab_size - 1}" in reply.error["message"]


@pytest.mark.parametrize(("most", "count"), [(0, 1), (1, 2)])
def test_a_completions_log_probabilities_hold_the_token_that_was_drawn(
    client: Client, most: int, count: int
) -> None:
    """OpenAI: up to logprobs + 1 entries."""
    drawn = {"temperature": 100, "seed": 3, "ignore_eos": True, "logprobs": most}
    body = {"prompt": "Hello", "max_tokens": 8, **drawn}
    found = client.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    places = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    assert all(listed[token] == logprob for token, logprob, listed in places)
    assert max(map(len, found["top_logprobs"])) == count
    refused = client.post("/v1/completions", {**body, "logprobs": 21}).error
    assert refused["param"] == "logprobs"
    assert refused["message"].startswith("logprobs is 21, expected 0 to 20")


@pytest.mark.parametrize(
    ("fields", "param", "fragment"),
    [
        ({"add_generation_prompt": False}, "add_generation_prompt", "has no add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message", "leave it out"),
        ({"tools": [{"type": "function"}]}, "tools", "has no tools"),
        ({"images": ["aGk="]}, "images", "a part of a message"),
        ({"return_token_strs": "yes"}, "return_token_strs", "expected boolean"),
        ({"messages": [user("a b " * 9000)]}, "messages", "the prompt has"),
    ],
)
def test_what_tokenize_cannot_do_is_refused(
    client: Client, fields: Body, param: str, fragment: str
) -> None:
    reply = client.post("/tokenize", {"messages": [user("Hello")], **fields})
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param
    assert fragment in reply.error["message"]


def test_tokenize_and_detokenize_report_unknown_fields(client: Client) -> None:
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        reply = client.post(path, {**body, "frobnicate": 1, "add_special_tokens": True})
        assert reply.status == 200, reply.body
        assert reply.headers["x-ignored-fields"] == "frobnicate"


def test_the_model_says_how_much_it_takes(client: Client, runner: Runner) -> None:
    body = client.get("/v1/models").json()
    assert [entry["id"] for entry in body["data"]] == ["nvlm-d", "gpt-4o"]
    assert body["data"][0]["max_model_len"] == runner.engine.limits.max_seq_len
    assert client.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
    assert client.get("/v1/models/other").error["code"] == "model_not_found"


def test_paths_and_methods_that_are_not_there_are_refused_alike(client: Client) -> None:
    assert client.get("/v1/engines").error["type"] == "invalid_request_error"
    assert client.get(CHAT).status == 405
    assert client.get("/version").json()["version"]
    assert set(client.get("/openapi.json").json()["paths"]) >= {CHAT, "/v1/completions"}


def test_metrics_have_the_stems_that_dashboards_know(client: Client, images: Images) -> None:
    shown = chat(user(picture(images("pixel_1x1.png"))))
    client.post(CHAT, shown)
    before = client.get("/metrics").body.decode()
    client.post(CHAT, shown)
    for name in ("queries", "hits"):
        series = f"nvlm_mm_cache_{name}_total "
        number = float(before.partition(f"\n{series}")[2].partition("\n")[0])
        assert f"\n{series}{number + 1}\n" in client.get("/metrics").body.decode()
    lines = client.get("/metrics").body.decode().splitlines()
    values = {
        name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")
    }
    assert values["nvlm_num_requests_running"] == 0
    assert values["nvlm_generation_tokens_total"] >= 6
    assert values['nvlm_request_success_total{finished_reason="length"}'] >= 1
    assert values["nvlm_time_to_first_token_seconds_count"] >= 1
    assert values['nvlm_e2e_request_latency_seconds_bucket{le="+Inf"}'] >= 1


def test_several_answers_and_log_probabilities(client: Client) -> None:
    fields = {"n": 2, "temperature": 5, "seed": 3, "logprobs": True, "top_logprobs": 2}
    reply = client.post(CHAT, chat(user("Hello"), **fields))
    assert reply.status == 200, reply.body
    first, second = reply.json()["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["message"]["content"] != second["message"]["content"]
    assert reply.json()["usage"]["completion_tokens"] == 12
    for choice in (first, second):
        listed = choice["logprobs"]["content"]
        data = b"".join(bytes(each["bytes"] or ()) for each in listed)
        assert data.decode(errors="replace") == choice["message"]["content"]
        for each in listed:
            assert each["logprob"] <= 0
            assert len(each["top_logprobs"]) == 2
            assert each["top_logprobs"][0]["logprob"] >= each["top_logprobs"][1]["logprob"]
    chunks = client.post(CHAT, chat(user("Hello"), stream=True, **fields)).events()
    for choice in (first, second):
        pieces = [
            each
            for chunk in chunks
            for each in chunk["choices"]
            if each["index"] == choice["index"]
        ]
        roles = [piece["delta"].get("role") for piece in pieces]
        assert roles == ["assistant"] + [None] * (len(pieces) - 1)
        said = "".join(piece["delta"]["content"] for piece in pieces)
        assert said == choice["message"]["content"]
        listed = [each for piece in pieces for each in piece["logprobs"]["content"]]
        assert listed == choice["logprobs"]["content"]
        reasons = [piece["finish_reason"] for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + ["length"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_names_the_seed_that_repeats_it(
    client: Client, path: str, is_streamed: bool
) -> None:
    body = {**chat(user("Hello"), max_tokens=8, temperature=5, n=2), "prompt": "Hello"}

    def answers(**more: Any) -> dict[int, tuple[str, list[int]]]:
        reply = client.post(path, {**body, **more, "stream": is_streamed})
        found: dict[int, tuple[str, list[int]]] = {}
        for choice in [
            choice
            for each in (reply.events() if is_streamed else [reply.json()])
            for choice in each["choices"]
        ]:
            part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            said, seeds = found.get(choice["index"], ("", []))
            found[choice["index"]] = (said + part["content"], seeds + _seeds(choice))
        return found

    drawn = answers()
    (first,), (second,) = (drawn[index][1] for index in (0, 1))
    assert second == first + 1
    assert answers(seed=first) == drawn
    assert {index: seeds for index, (_, seeds) in answers(temperature=0, n=1).items()} == {0: []}


def _seeds(choice: Body) -> list[int]:
    return [choice["seed"]] if "seed" in choice else []


def test_completions_have_log_probabilities_of_their_own(client: Client) -> None:
    body = {"prompt": ["Hello", "Bye"], "max_tokens": 4, "n": 2, "temperature": 5, "logprobs": 1}
    choices = client.post("/v1/completions", {**body, "seed": 4}).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    chunks = client.post("/v1/completions", {**body, "seed": 4, "stream": True}).events()
    for choice in choices:
        listed = choice["logprobs"]
        assert len(listed["tokens"]) == len(listed["token_logprobs"]) == 4
        assert listed["text_offset"][0] == 0
        pieces = [
            each
            for chunk in chunks
            for each in chunk["choices"]
            if each["index"] == choice["index"]
        ]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            found = [each for piece in pieces for each in piece["logprobs"][name]]
            assert found == listed[name]


def test_log_probabilities_of_the_prompt_are_reported_once(client: Client) -> None:
    reply = client.post(CHAT, chat(user("Hello"), prompt_logprobs=1))
    body = reply.json()["prompt_logprobs"]
    assert body[0] is None
    assert len(body) == reply.json()["usage"]["prompt_tokens"]
    refused(client, chat(user("Hello"), prompt_logprobs=1, stream=True), "prompt_logprobs")


COLOUR: Body = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {**schema_format(COLOUR)}},
        {"structured_outputs": {"json": COLOUR, "regex": None, "disable_any_whitespace": False}},
        {"structured_outputs": {"json": json.dumps(COLOUR)}},
        {"guided_json": COLOUR},
        {"json_schema": COLOUR},
    ],
)
def test_an_answer_matches_its_schema(client: Client, fields: Body, is_streamed: bool) -> None:
    body = chat(user("Which?"), **fields, max_tokens=200, stream=is_streamed, temperature=1, seed=1)
    reply = client.post(CHAT, body)
    assert reply.status == 200, reply.body
    if is_streamed:
        text = "".join(event["choices"][0]["delta"]["content"] for event in reply.events())
    else:
        text = content(reply)
    jsonschema.validate(json.loads(text), COLOUR)


@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        ({"choice": ["a.b", "yes"]}, r"a\.b|yes"),
        ({"regex": "[0-9]{3}-x"}, "[0-9]{3}-x"),
        ({"grammar": 'start: "one" | "two"'}, "one|two"),
    ],
)
def test_an_answer_matches_its_guide(
    client: Client, path: str, guide: Body, pattern: str, is_short: bool
) -> None:
    body = {**chat(user("Which?")), "prompt": "Which?", "max_tokens": 30}
    body |= guide if is_short else {"structured_outputs": guide}
    (choice,) = client.post(path, body).json()["choices"]
    assert re.fullmatch(pattern, choice.get("text") or choice["message"]["content"]), choice
    assert choice["finish_reason"] == "stop"


def test_cached_tokens_are_those_that_an_earlier_request_computed(client: Client) -> None:
    words = "So what was it that you saw there? " * 12  # nobody else asks this
    usages = []
    for stream in (False, True, False):
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        reply = client.post(CHAT, chat(user(words), **options))
        usages.append((reply.events()[-1] if stream else reply.json())["usage"])
    found = [usage.pop("prompt_tokens_details")["cached_tokens"] for usage in usages]
    assert usages[0] == usages[1] == usages[2]
    whole = (usages[0]["prompt_tokens"] - 1) // 32 * 32
    assert found[0] < 32 < whole == found[1] == found[2]
    reply = client.post("/v1/completions", {"prompt": [words, words], "max_tokens": 2})
    reply = client.post("/v1/completions", {"prompt": [words, words], "max_tokens": 2})
    used = reply.json()["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] > 0.7 * used["prompt_tokens"]


def test_penalties_and_the_end_reach_the_runtime(client: Client) -> None:
    whole = content(client.post(CHAT, chat(user("Hello"), max_tokens=12)))
    penalised = {"repetition_penalty": 2.0, "presence_penalty": 2, "frequency_penalty": 2}
    assert content(client.post(CHAT, chat(user("Hello"), max_tokens=12, **penalised))) != whole
    ended = chat(user("Hello"), max_tokens=12, ignore_eos=True, min_tokens=12)
    assert client.post(CHAT, ended).json()["usage"]["completion_tokens"] == 12
    first = client.post("/tokenize", {"prompt": whole[:1]}).json()["tokens"][0]
    biased = chat(user("Hello"), logit_bias={str(first): -100}, max_tokens=1)
    assert content(client.post(CHAT, biased)) != whole[:1]
    refused(client, chat(user("Hello"), repetition_penalty=0), "repetition_penalty", "above 0")
    refused(client, chat(user("Hello"), logit_bias={"x": 1}), "logit_bias", "token id")
