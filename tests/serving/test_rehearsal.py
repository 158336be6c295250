"""What a server asks itself before it is ready: each kind comes once, and nothing of it is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from nvlm.program import startup
from runtime.decoder.executor import DecoderRequest
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving import rehearsal
from runtime.serving.rehearsal import rehearse
from runtime.serving.runner import Runner
from runtime.serving.server import Server


@pytest.fixture
def server(float32_engine_dir: Path) -> Iterator[Server]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        server = Server(runner)
        yield server
        server.close()


@pytest.fixture
def asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[DecoderRequest]:
    """What reaches the decoder, in order."""
    requests: list[DecoderRequest] = []
    submit = server.runner.decoder.submit

    def record(request: DecoderRequest) -> int:
        requests.append(request)
        return submit(request)

    monkeypatch.setattr(server.runner.decoder, "submit", record)
    return requests


def answer(server: Server, request: GenerationRequest) -> Answer:
    answers: SimpleQueue[Answer] = SimpleQueue()
    server.submit(request, answers.put)
    while not (last := answers.get(timeout=30)).is_last:
        pass
    return last


def test_every_kind_of_request_comes_once(server: Server, asked: list[DecoderRequest]) -> None:
    rehearse(server)
    sampling = [request.sampling for request in asked]
    assert any(not each.is_greedy for each in sampling)
    assert any(each.has_penalty and each.logit_bias for each in sampling)
    assert any(each.logprobs and each.prompt_logprobs is not None for each in sampling)
    assert any(request.same_prompt_as is not None for request in asked)
    assert any(request.bad_words for request in asked)
    assert any(request.compiled_guide is not None for request in asked)
    vision, tiling = server.runner.engine.vision_config, server.runner.engine.tiling
    num_tiles = {sum(each.rows_per_image) // vision.tokens_per_tile for each in asked}
    assert {1, tiling.max_tiles_per_image} <= num_tiles


def test_on_a_gpu_pictures_of_every_number_of_tiles_come(server: Server) -> None:
    server.runner.device = torch.device("cuda")
    most = server.runner.engine.tiling.max_num_tiles
    assert rehearsal._columns(server.runner) == list(range(1, most + 1))


def test_nothing_of_it_is_counted_or_found_by_a_client(server: Server) -> None:
    untouched = server.samples()
    rehearse(server)
    usage = ("nvlm_kv_cache_usage_perc", ())
    before, after = ({**each, usage: 0.0} for each in (untouched, server.samples()))
    assert after == before
    assert server.num_open == 0
    last = answer(server, GenerationRequest.images_first("Well?", max_new_tokens=2))
    assert last.result is not None
    assert last.result.num_reused_tokens == 0


def test_where_a_token_takes_a_second_nothing_more_is_asked(
    server: Server, asked: list[DecoderRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_SLOW_S", 0.0)
    rehearse(server)
    assert [request.prompt_table for request in asked] == [None, None]


def test_without_time_it_leaves_a_server_that_answers(server: Server) -> None:
    rehearse(server, limit_s=0.0)
    assert answer(server, GenerationRequest.images_first("Well?", max_new_tokens=2)).error is None


def test_a_decoder_that_breaks_a_step_of_it_is_reported_and_continues(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, breaks = server.runner.decoder.step, [True]

    def break_once() -> object:
        if breaks:
            breaks.clear()
            raise RuntimeError("no such kernel")
        return step()

    monkeypatch.setattr(server.runner.decoder, "step", break_once)
    rehearse(server)
    assert "a request of the rehearsal failed: RuntimeError('no such kernel')" in caplog.text
    assert answer(server, GenerationRequest.images_first("Well?", max_new_tokens=2)).error is None


def test_phases_are_logged_where_a_program_asks_for_them(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("startup").setLevel(logging.NOTSET)  # a server that ran here has asked
    with startup.phase("nobody's"):
        pass
    with caplog.at_level("INFO", "startup"), startup.phase("the weights"):
        pass
    (line,) = caplog.messages
    assert line.startswith("start-up: the weights took 0.0")


def test_a_process_has_an_age() -> None:
    assert 0.0 < startup.process_age_s() < 1e6
