"""The `tensorrt_llm` form on the real Triton server, the C++ backend replaced by a double.

TensorRT-LLM needs a GPU. The double (tests/data/tensorrt_llm_double) has the rendered signature of
its Triton backend and refuses whatever that could not be given. Also here: models that answer once
(decoupled: false), as TensorRT-LLM's clients without streaming need them.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from frontends.triton.render import PROJECT_DIR, ServeOptions, render
from frontends.triton.server import Ports, TritonServer
from nvlm.inputs.images import load_image
from runtime.engine.engine_dir import EngineDir
from runtime.requests.sampling import SamplingParams, with_sampling
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.support.asking import Images
from tests.support.cases import PHOTO
from tests.support.triton_server import (
    ANSWER_TIMEOUT_S,
    START_TIMEOUT_S,
    Served,
    Stream,
    ask,
    free_ports,
    tensors,
)

MAX_QUEUE_SIZE = 8
DOUBLE = Path(__file__).parents[1] / "data" / "tensorrt_llm_double" / "1" / "model.py"


def put_double(repository: Path) -> None:
    """The rendered configuration stays, but for the backend's name."""
    model = repository / "tensorrt_llm"
    config = (model / "config.pbtxt").read_text()
    assert config.count('backend: "tensorrtllm"') == 1
    (model / "config.pbtxt").write_text(config.replace('"tensorrtllm"', '"python"'))
    path = f"import sys\nsys.path.insert(0, {str(PROJECT_DIR)!r})\n"
    (model / "1" / "model.py").write_text(path + DOUBLE.read_text())


def put_unary(repository: Path) -> None:
    """`nvlm_unary` beside `nvlm`, and `ensemble` in front of it."""
    shutil.copytree(repository / "nvlm", repository / "nvlm_unary")
    for model, changes in (
        (
            "nvlm_unary",
            (('name: "nvlm"', 'name: "nvlm_unary"'), ("decoupled: true", "decoupled: false")),
        ),
        ("ensemble", (('model_name: "nvlm"', 'model_name: "nvlm_unary"'),)),
    ):
        path = repository / model / "config.pbtxt"
        text = path.read_text()
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path.write_text(text)


@pytest.fixture(scope="module")
def server(float32_engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("tensorrt_llm")
    repository = scratch / "models"
    repository.mkdir()
    http, grpc, metrics = free_ports(3)
    ports = Ports("127.0.0.1", http, grpc, metrics)
    options = ServeOptions(
        "tensorrt_llm",
        device="cpu",
        num_threads=1,
        max_queue_size=MAX_QUEUE_SIZE,
        grpc_url=ports.grpc_url,
    )
    render(EngineDir.read(float32_engine_dir), repository, options)
    put_double(repository)
    put_unary(repository)
    with TritonServer(repository, scratch, ports) as triton:
        triton.wait_until_ready(START_TIMEOUT_S)
        yield Served(triton.process, http, grpc, metrics, triton.log)


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Runner:
    return Runner.open(float32_engine_dir, torch.device("cpu"))


@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.9, "top_k": 9, "seed": 2**40},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.25},
        {"min_tokens": 8, "temperature": 0.75, "seed": 5},
    ],
)
def test_answers_are_those_of_the_runner(
    server: Served, runner: Runner, images: Images, num_images: int, options: dict[str, float]
) -> None:
    names = ("landscape_800x450.png", "portrait_400x1000.png", "pixel_1x1.png")[:num_images]
    paths = tuple(images(name) for name in names)
    sampling = with_sampling(SamplingParams(), options)
    expected = runner.generate(
        GenerationRequest.images_first("How?", paths, max_new_tokens=16, sampling=sampling)
    )
    files = {"image_bytes": [path.read_bytes() for path in paths]} if paths else {}
    found = ask(server, tensors("How?", 16, stream=True, **options, **files))
    assert found.error is None
    assert found.text == expected.text
    assert found.outputs["finish_reason"].decode() == expected.finish_reason
    assert found.outputs["num_tokens"] == expected.num_tokens
    assert found.outputs["num_prompt_tokens"] == expected.num_prompt_tokens


def test_words_biases_log_probabilities_and_n_reach_the_backend(
    server: Served, runner: Runner
) -> None:
    asked = {"temperature": 0.75, "seed": 5, "presence_penalty": 0.5}
    plain = runner.generate("How?", max_new_tokens=12, **asked)
    word = runner.tokenizer.text_of(plain.token_ids[0])
    biases = {plain.token_ids[1]: -100.0, 7: 5.0}
    expected = runner.generate(
        "How?",
        max_new_tokens=12,
        **asked,
        n=2,
        bad_words=[word or "x"],
        logit_bias=biases,
        logprobs=True,
    )
    assert expected.token_ids != plain.token_ids
    found = ask(
        server,
        tensors(
            "How?",
            12,
            **asked,
            n=2,
            bad_words=[(word or "x").encode()],
            logit_bias=json.dumps(biases).encode(),
            return_log_probs=True,
        ),
    )
    assert found.error is None
    choices = json.loads(found.outputs["choices"])
    for choice, other in zip(choices, expected.choices, strict=True):
        assert choice["token_ids"] == other.token_ids
        assert other.logprobs is not None
        assert [each["logprob"] for each in choice["logprobs"]] == pytest.approx(
            [each.logprob for each in other.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("settings", [{"min_p": 0.1}, {"prompt_logprobs": 1}])
def test_what_the_backend_does_not_have_is_refused_by_name(
    server: Served, settings: dict[str, float]
) -> None:
    (name,) = settings
    found = ask(server, tensors("How?", 4, **settings))
    assert found.error is not None
    assert f"{name} is" in found.error
    assert "has no such setting" in found.error


@pytest.mark.parametrize(
    ("guide_type", "guide", "pattern"),
    [
        ("choice", '["yes", "no"]', "yes|no"),
        ("regex", "[a-c]{4}", "[a-c]{4}"),
        ("json_schema", '{"type": "boolean"}', "true|false"),
    ],
)
def test_answers_match_their_guides(
    server: Served, guide_type: str, guide: str, pattern: str
) -> None:
    guided = {"guided_decoding_guide_type": guide_type, "guided_decoding_guide": guide}
    found = ask(server, tensors("How?", 16, stream=True, **guided))
    assert found.error is None
    assert re.fullmatch(pattern, found.text)
    assert found.outputs["finish_reason"] == b"stop"


def test_a_grammar_is_refused_by_name(server: Served) -> None:
    guided = {"guided_decoding_guide_type": "grammar", "guided_decoding_guide": 'start: "a"'}
    found = ask(server, tensors("How?", 16, stream=True, **guided))
    assert found.error is not None
    assert "grammar is given, and decoder 'tensorrt_llm' has no such guide" in found.error


def test_an_answer_ends_at_its_end_token(server: Served, runner: Runner) -> None:
    """The backend leaves it out and says nothing of the reason."""
    ids = runner.generate(GenerationRequest(("How?",), max_new_tokens=16)).token_ids
    found = ask(server, tensors("How?", 16, end_id=ids[4]))
    assert found.outputs["finish_reason"] == b"stop"
    assert found.text == runner.tokenizer.decode(ids[: ids.index(ids[4])])


def test_a_stop_word_and_a_cancellation_stop_the_backend(server: Served, runner: Runner) -> None:
    """Else its eight places would stay taken by answers of 400 tokens."""
    whole = runner.generate(GenerationRequest(("How?",), max_new_tokens=400)).text
    assert len(whole) > 100
    with Stream(server) as stream:
        for i in range(8):
            stream.send(f"gone{i}", tensors("How?", 400, stream=True))
        stream.take()
    for _ in range(3):
        found = ask(server, tensors("How?", 400, stop_words=[whole[5:8].encode()]))
        assert found.text == whole[: whole.index(whole[5:8])]
    server.wait_for_sample("nvlm_requests_running", 0)


def test_requests_share_the_backend(server: Served, runner: Runner) -> None:
    questions = [f"Question {i}?" for i in range(12)]
    expected = [
        runner.generate(GenerationRequest((text,), max_new_tokens=20)).text for text in questions
    ]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda text: ask(server, tensors(text, 20)).text, questions))
    assert found == expected


def test_hundreds_of_requests_at_once_are_all_answered(server: Served, runner: Runner) -> None:
    """The Python backend's own calls to other models broke here after some hundred."""
    texts = [f"Question {i}?" for i in range(6)]
    expected = {
        text: runner.generate(GenerationRequest((text,), max_new_tokens=4)).text for text in texts
    }

    def wrong(number: int) -> bool:
        text = texts[number % len(texts)]
        return ask(server, tensors(text, 4)).text != expected[text]

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(wrong, range(300))) == 0


def test_an_error_of_the_backend_ends_one_request(server: Served) -> None:
    with Stream(server) as other:
        other.send("kept", tensors("How?", 40))
        answer = ask(server, tensors("How?", 4, temperature=99.0))
        assert answer.error is not None
        assert "the double refuses: the temperature" in answer.error
        other.finish()
        assert other.answers["kept"].error is None
    assert ask(server, tensors("How?", 4)).error is None


@pytest.mark.parametrize("model", ["ensemble", "nvlm_unary"])
def test_models_that_answer_once_take_unary_calls(
    server: Served, runner: Runner, model: str
) -> None:
    """TensorRT-LLM's client without --streaming: one call, one response, text_output by beam."""
    pixels = np.asarray(load_image(PHOTO))
    expected = runner.generate(
        GenerationRequest.images_first("Which city?", (PHOTO,), max_new_tokens=16)
    )
    inputs = tensors(
        "Which city?",
        16,
        beam_width=1,
        temperature=1.0,
        end_id=-1,
        pad_id=1,
        top_k=1,
        top_p=0.0,
        stream=False,
        image_bytes_input=np.array([[pixels]]),
        repetition_penalty=1.0,
    )
    outputs = [grpcclient.InferRequestedOutput("text_output")]

    def call(_: int) -> str:
        with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            result = client.infer(model, inputs, outputs=outputs, client_timeout=ANSWER_TIMEOUT_S)
            return str(result.as_numpy("text_output")[0].decode())

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(call, range(8))) == {expected.text}
    with (
        grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client,
        pytest.raises(InferenceServerException, match="stream is true"),
    ):
        client.infer(model, tensors("x", 4, stream=True), client_timeout=ANSWER_TIMEOUT_S)


def status_of(call: Callable[[], object]) -> tuple[str, str]:
    """gRPC's code and the sentence that `call` fails with."""
    with pytest.raises(InferenceServerException) as raised:
        call()
    return str(raised.value.status()), str(raised.value.message())


def test_unary_calls_fail_with_a_grpc_status_code(server: Served) -> None:
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:

        def status(inputs: list[grpcclient.InferInput]) -> tuple[str, str]:
            return status_of(
                lambda: client.infer("nvlm_unary", inputs, client_timeout=ANSWER_TIMEOUT_S)
            )

        code, message = status(tensors("x", -4))
        assert (code, message) == (
            "StatusCode.INVALID_ARGUMENT",
            "max_tokens is -4, expected 1 or more",
        )
        assert status(tensors("x", 4, image_bytes=[b"no"]))[0] == "StatusCode.INVALID_ARGUMENT"
        code, message = status(tensors("x", 4, temperature=99.0))
        assert code == "StatusCode.INTERNAL"
        assert "the double refuses" in message


def test_a_full_server_is_unavailable_by_its_grpc_status_code(
    server: Served, runner: Runner
) -> None:
    """Asked at once for twice as many long answers as it has places: in the batch, in the model's
    queue, and as many again in Triton's."""
    num_calls = 2 * 2 * (runner.engine.limits.max_batch_size + MAX_QUEUE_SIZE)
    statuses: queue.Queue[str] = queue.Queue()

    def answered(result: object, error: InferenceServerException | None) -> None:
        statuses.put("OK" if error is None else str(error.status()))

    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        inputs = tensors("How?", 300, min_tokens=300)
        for _ in range(num_calls):
            client.async_infer("nvlm_unary", inputs, answered, client_timeout=ANSWER_TIMEOUT_S)
        found = {statuses.get(timeout=ANSWER_TIMEOUT_S) for _ in range(num_calls)}
    assert found == {"OK", "StatusCode.UNAVAILABLE"}


def test_a_unary_client_that_gives_up_frees_its_slot(server: Served) -> None:
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        code, _ = status_of(
            lambda: client.infer("nvlm_unary", tensors("How?", 900), client_timeout=0.3)
        )
        assert code == "StatusCode.DEADLINE_EXCEEDED"
    server.wait_for_sample("nvlm_requests_running", 0, timeout_s=3)


def test_streams_that_ask_for_it_fail_with_a_status_code(server: Served) -> None:
    """Else a stream's error is a sentence in a message of the stream."""
    answers: queue.Queue[object] = queue.Queue()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        client.start_stream(
            lambda result, error: answers.put(error), headers={"triton_grpc_error": "true"}
        )
        client.async_stream_infer("nvlm", tensors("x", -4))
        error = answers.get(timeout=30)
        assert isinstance(error, InferenceServerException)
        assert error.status() == "StatusCode.INVALID_ARGUMENT"
        assert "max_tokens is -4" in str(error)
