"""Files of models, checkpoints and engines: safetensors, configurations, tokenizer, report."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from build.conversion.convert import ConvertOptions, convert
from build.conversion.report.quantization_report import QuantizationReport
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.inputs.tokenizer import TOKENIZER_FILE, Tokenizer
from nvlm.model.config import NVLMConfig
from nvlm.program.json_files import read_json_object
from runtime.engine.engine_dir import EngineDir
from tests.fuzz.kind import Opened
from tests.fuzz.mutations import Draw, json_text, mutated_bytes, mutated_json
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint

_CPU = torch.device("cpu")
_MEMORY_BYTES = 24 << 30
_TEXT = "Which 7 words? na\u00efve \u597d\n\n  x"


def open_safetensors(folder: Path) -> Opened:
    source = _model(folder)
    seed = min(source.glob("*.safetensors"), key=lambda path: path.stat().st_size).read_bytes()
    (length,) = struct.unpack("<Q", seed[:8])
    header, data = json.loads(seed[8 : 8 + length]), seed[8 + length :]
    path = folder / "case.safetensors"

    def read(case: bytes) -> None:
        path.write_bytes(case)
        reader = SafetensorsReader(path)
        for name, info in reader.tensors.items():
            tensor = reader.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
            assert tensor.nbytes <= len(case)
            tensor.reshape(-1).view(torch.uint8).sum()  # touches every byte

    @st.composite
    def with_header(draw: Draw) -> bytes:
        text = json.dumps(draw(mutated_json([header]))).encode()
        return struct.pack("<Q", len(text)) + text + data

    return Opened(st.one_of(with_header(), mutated_bytes([seed])), read)


def open_configs(folder: Path) -> Opened:
    """config.json of a model and of a checkpoint, and all that an engine directory says."""
    model = _model(folder)
    checkpoint = _checkpoint(folder, model)
    options = BuildOptions(vision="torch", max_num_images=3)
    engine = folder / "engine"
    build_engine(specify(checkpoint, options, _CPU, _MEMORY_BYTES), engine, options)
    files = {
        "model": model / layout.CONFIG,
        "checkpoint": checkpoint / layout.CONFIG,
        "manifest": engine / layout.MANIFEST,
        "llm": next((engine / layout.LLM).glob("*.json")),
        "vision": engine / layout.VISION / layout.CONFIG,
    }
    right = {name: path.read_bytes() for name, path in files.items()}
    case_of = {name: json_text([json.loads(text)]) for name, text in right.items()}
    cases = st.one_of(*(st.tuples(st.just(name), case) for name, case in case_of.items()))
    place = folder / "case.json"

    def read(case: tuple[str, bytes]) -> None:
        name, text = case
        if name in ("model", "checkpoint"):
            place.write_bytes(text)
            values = read_json_object(place)
            found: Any = (
                NVLMConfig.from_hf(values, place)
                if name == "model"
                else CheckpointConfig.from_json(values, place)
            )
            _assert_plausible(asdict(found))
            return
        files[name].write_bytes(text)
        try:
            opened = EngineDir.read(engine)
            for part in (opened.vision_config, opened.tiling, opened.limits):
                _assert_plausible(asdict(part))
            _assert_plausible(asdict(opened.checkpoint_config))
        finally:
            files[name].write_bytes(right[name])

    return Opened(cases, read)


def open_tokenizer(folder: Path) -> Opened:
    model = _model(folder)
    values = json.loads((model / TOKENIZER_FILE).read_text())
    place = folder / "tokenizer"
    place.mkdir()

    def read(text: bytes) -> None:
        (place / TOKENIZER_FILE).write_bytes(text)
        tokenizer = Tokenizer(place)
        ids = tokenizer.encode(_TEXT)
        assert ids == tokenizer.encode(_TEXT)
        assert all(0 <= each < tokenizer.num_tokens for each in ids)
        assert tokenizer.decode(ids) == _TEXT

    return Opened(json_text([values]), read)


def open_reports(folder: Path) -> Opened:
    checkpoint = _checkpoint(folder, _model(folder))
    values = json.loads((checkpoint / layout.REPORT).read_text())
    place = folder / "report.json"

    def read(text: bytes) -> None:
        place.write_bytes(text)
        report = QuantizationReport.read(place)
        for number in _numbers([asdict(row) for row in (*report.linears, *report.attentions)]):
            assert math.isfinite(number)
            assert number >= 0
        names = [row.linear for row in report.linears]
        assert len(names) == len(set(names))

    return Opened(json_text([values]), read)


def _model(folder: Path) -> Path:
    path = folder / "model"
    write_random_checkpoint(path, PRESETS["tiny"], seed=0, max_shard_bytes=100_000)
    return path


def _checkpoint(folder: Path, model: Path) -> Path:
    path = folder / "checkpoint"
    convert(HuggingFaceSource(model), path, ConvertOptions(calib_size=1), _CPU)
    return path


def _assert_plausible(values: dict[str, Any]) -> None:
    for number in _numbers(values):
        assert math.isfinite(number)
        assert 0 <= number < 1 << 40


def _numbers(values: Any) -> Iterator[float]:
    if isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _numbers(value)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield values
