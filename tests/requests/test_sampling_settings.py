"""One row of the table of sampling settings is all that the programs need to know one.

A row is added to a copy of the table, and every module that reads it is imported anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from nvlm.program.errors import UserError
from runtime.requests import sampling
from tests.support.command import ROOT

TABLE = "runtime.requests.sampling"
READERS = ("runtime", "frontends", "evaluation", "run")
LAST_ROW = "    seed: int | None = _row("
NEW_ROW = """    crispness: float = _row(
        0.5,
        minimum=0.0,
        maximum=2.0,
        expected="0 to 2",
        help="how crisp an answer is",
        triton_type="TYPE_FP32",
        trtllm_keyword=None,
        trtllm_tensor=None,
    )
"""
ENOUGH = {"prompt": "hi", "crispness": 1.5}


def _readers() -> dict[str, ModuleType]:
    return {name: mod for name, mod in sys.modules.items() if name.partition(".")[0] in READERS}


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    """The table with one row more, which the modules imported from now on read."""
    before = _readers()
    path = ROOT / "runtime" / "requests" / "sampling.py"
    source = path.read_text()
    assert source.count(LAST_ROW) == 1
    for name in before:
        del sys.modules[name]
    try:
        module = ModuleType(TABLE)
        sys.modules[TABLE] = module
        code = compile(source.replace(LAST_ROW, NEW_ROW + LAST_ROW), str(path), "exec")
        exec(code, module.__dict__)
        yield module
    finally:
        for name in _readers():
            del sys.modules[name]
        sys.modules.update(before)


def engine_for(engine_dir: Path, decoder_target: str) -> Any:
    engine = import_module("runtime.engine.engine_dir").EngineDir.read(engine_dir)
    return replace(engine, decoder_target=decoder_target)


def request_of(values: dict[str, Any]) -> Any:
    types = import_module("runtime.requests.types")
    request_file = import_module("runtime.requests.request_file")
    return request_file.request_from_json(values, Path(), types.GenerationRequest(()))


def test_help_names_it(table: Any) -> None:
    message = " ".join(import_module("run").parser().format_help().split())
    assert "--crispness CRISPNESS how crisp an answer is" in message


def test_the_flag_reaches_the_request(table: Any) -> None:
    run = import_module("run")
    flags = run.parser().parse_args(
        ["--engine_dir", "D", "--prompt", "hi", "--crispness", "1.5", "--top_k", "3"]
    )
    expected = table.SamplingParams(temperature=1.0, top_k=3, crispness=1.5)
    assert run.default_request(flags).sampling == expected


def test_a_json_line_takes_it(table: Any) -> None:
    assert request_of(ENOUGH).sampling == table.SamplingParams(crispness=1.5)
    assert request_of({"prompt": "hi"}).sampling.crispness == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("very", "crispness is 'very', expected float"),
        (True, "crispness is True, expected float"),
        (2.5, "crispness is 2.5, expected 0 to 2"),
        (-1, "crispness is -1, expected 0 to 2"),
        (float("nan"), "crispness is nan, expected 0 to 2"),
    ],
)
def test_a_json_line_with_a_wrong_value_is_refused(table: Any, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        request_of({"prompt": "hi", "crispness": value})


@pytest.mark.parametrize("form", ["torch", "tensorrt_llm"])
def test_tritons_configuration_has_its_input(
    table: Any, engine_dir: Path, tmp_path: Path, form: str
) -> None:
    triton = import_module("frontends.triton.render")
    triton.render(engine_for(engine_dir, "torch"), tmp_path, triton.ServeOptions(form))
    text = (tmp_path / "nvlm" / "config.pbtxt").read_text()
    found = {tensor.name: tensor for tensor in text_format.Parse(text, ModelConfig()).input}
    crispness = found["crispness"]
    assert DataType.Name(crispness.data_type) == "TYPE_FP32"
    assert (list(crispness.dims), crispness.optional) == ([1], True)
    assert "crispness" not in (tmp_path / "ensemble" / "config.pbtxt").read_text()


def test_tritons_input_reaches_the_request(table: Any, engine_dir: Path) -> None:
    tensors = {
        "text_input": np.array([[b"hi"]], np.object_),
        "max_tokens": np.array([[4]], np.int32),
        "crispness": np.array([[1.5]], np.float32),
    }
    limits = engine_for(engine_dir, "torch").limits
    read_request = import_module("frontends.triton.request").read_request
    assert read_request(tensors, limits).sampling == table.SamplingParams(crispness=1.5)
    with pytest.raises(UserError, match=r"^crispness is 3.0, expected 0 to 2$"):
        read_request({**tensors, "crispness": np.array([[3.0]], np.float32)}, limits)


REFUSED = (
    r"^crispness is 1.5, and decoder 'tensorrt_llm' has no such setting; leave it out, or build"
)


def test_tensorrt_llm_refuses_what_it_cannot_do_before_it_is_loaded(
    table: Any, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = import_module("run")
    engine = engine_for(engine_dir, "tensorrt_llm")
    monkeypatch.setattr(run.EngineDir, "read", lambda _: engine)
    flags = ["--engine_dir", str(engine_dir), "--prompt", "hi", "--crispness", "1.5"]
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(UserError, match=REFUSED):
        run.main()


def test_every_door_of_a_tensorrt_llm_engine_refuses_it(table: Any, engine_dir: Path) -> None:
    """A neutral value asks for nothing; the torch decoder's engine takes any."""
    prepare = import_module("runtime.serving.prepare").prepare
    ticket = import_module("runtime.serving.ticket").Ticket
    tokenizer = import_module("nvlm.inputs.tokenizer").Tokenizer(engine_dir / "tokenizer")
    engine = engine_for(engine_dir, "tensorrt_llm")
    with pytest.raises(UserError, match=REFUSED):
        prepare(engine, tokenizer, ticket(request_of(ENOUGH)))
    prepare(engine, tokenizer, ticket(request_of({**ENOUGH, "crispness": 0.5})))
    prepare(engine_for(engine_dir, "torch"), tokenizer, ticket(request_of(ENOUGH)))


def test_both_dialects_of_tensorrt_llm_refuse_it(table: Any) -> None:
    dialect = import_module("runtime.decoder.tensorrt_llm_dialect")
    asked = table.SamplingParams(crispness=1.5)
    with pytest.raises(UserError, match=REFUSED):
        dialect.sampling_keywords(asked)
    with pytest.raises(UserError, match=r"^crispness is 1.5, and TensorRT-LLM's Triton backend"):
        dialect.sampling_tensors(asked)


TOP_K = r"^top_k is 1025, and decoder 'tensorrt_llm' takes 1024 at most; lower it, or build"


def test_tensorrt_llm_refuses_a_top_k_that_it_would_clip_before_it_is_loaded(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = import_module("run")
    engine = engine_for(engine_dir, "tensorrt_llm")
    monkeypatch.setattr(run.EngineDir, "read", lambda _: engine)
    flags = ["--engine_dir", str(engine_dir), "--prompt", "hi", "--top_k", "1025"]
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(UserError, match=TOP_K):
        run.main()


def test_every_door_and_dialect_of_tensorrt_llm_refuses_a_top_k_that_it_would_clip(
    engine_dir: Path,
) -> None:
    prepare = import_module("runtime.serving.prepare").prepare
    ticket = import_module("runtime.serving.ticket").Ticket
    tokenizer = import_module("nvlm.inputs.tokenizer").Tokenizer(engine_dir / "tokenizer")
    dialect = import_module("runtime.decoder.tensorrt_llm_dialect")
    engine = engine_for(engine_dir, "tensorrt_llm")
    asked, most = ({"prompt": "hi", "top_k": top_k} for top_k in (1025, 1024))
    with pytest.raises(UserError, match=TOP_K):
        prepare(engine, tokenizer, ticket(request_of(asked)))
    prepare(engine, tokenizer, ticket(request_of(most)))
    prepare(engine_for(engine_dir, "torch"), tokenizer, ticket(request_of(asked)))
    for words in (dialect.sampling_keywords, dialect.sampling_tensors):
        with pytest.raises(UserError, match=TOP_K):
            words(request_of(asked).sampling)
        assert words(request_of(most).sampling)


def test_values_that_ask_for_nothing_are_left_out() -> None:
    params = sampling.SamplingParams(temperature=0.5, top_k=0, seed=7)
    assert sampling.non_neutral(params) == {"temperature": 0.5, "seed": 7}
    assert sampling.non_neutral(sampling.SamplingParams()) == {}


def test_a_setting_that_tensorrt_llm_has_is_called_and_typed_as_it_says() -> None:
    data = ROOT / "tests" / "data"
    symbols = json.loads((data / "trtllm_api.json").read_text())["symbols"]
    keywords = symbols["tensorrt_llm.bindings.executor.SamplingConfig"]["fields"]
    triton = json.loads((data / "tensorrt_llm_triton.json").read_text())
    ensemble, backend = (
        {spec["name"]: spec["data_type"] for spec in triton[model]["inputs"]}
        for model in ("ensemble", "tensorrt_llm")
    )
    for row in sampling.SETTINGS:
        assert row.trtllm_keyword is None or row.trtllm_keyword in keywords, row.name
        assert row.trtllm_tensor is None or backend[row.trtllm_tensor] == row.triton_type, row.name
        assert ensemble.get(row.name, row.triton_type) == row.triton_type, row.name


def test_neutral_values_are_in_range() -> None:
    for row in sampling.SETTINGS:
        row.check(row.neutral)
