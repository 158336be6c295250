"""What one rank's parts are opened with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.decoder.executor import DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.serving import engine_parts
from runtime.serving.engine_parts import for_answers, open_parts, vision_slice_ms

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "device", "ms"),
    [
        (None, CUDA, 0.0),
        (DecoderOptions(), CUDA, 0.0),
        (DecoderOptions(max_step_ms=None), CUDA, 33.0 * 3 / 8),
        (DecoderOptions(max_step_ms=None), CPU, 0.0),
        (DecoderOptions(max_step_ms=48.0), CUDA, 18.0),
    ],
)
def test_a_slice_of_vision_takes_a_third_of_the_bound_of_a_step(
    engine_dir: Path, options: DecoderOptions | None, device: torch.device, ms: float
) -> None:
    engine = EngineDir.read(engine_dir)
    assert vision_slice_ms(engine, device, options) == pytest.approx(ms)


def test_a_decoder_with_streams_of_its_own_needs_no_slices(engine_dir: Path) -> None:
    engine = replace(EngineDir.read(engine_dir), decoder_target="tensorrt_llm")
    assert vision_slice_ms(engine, CUDA, DecoderOptions(max_step_ms=None)) == 0.0


def test_vision_is_opened_with_its_slices(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, opened = EngineDir.read(engine_dir), list[Any]()

    def create(*given: Any, use_graphs: bool) -> None:
        opened.append((*given, use_graphs))

    monkeypatch.setattr(engine_parts, "create_vision_executor", create)
    open_parts(engine, CPU, DecoderOptions(max_step_ms=8.0))[1].close()
    open_parts(engine, CPU)[1].close()
    assert [given[2] for given in opened] == [3.0, 0.0]
    open_parts(engine, CPU, DecoderOptions(num_answers=1))[1].close()
    assert [given[3] for given in opened] == [True, True, False]


def test_one_requests_answers_leave_no_room_for_others_on_a_gpu(engine_dir: Path) -> None:
    engine = EngineDir.read(engine_dir)
    most = engine.limits.max_batch_size
    assert most > 1
    assert for_answers(engine, CUDA, 1).limits == replace(engine.limits, max_batch_size=1)
    assert for_answers(engine, CUDA, most + 1).limits == engine.limits
    assert for_answers(engine, CUDA, None) is engine
    assert for_answers(engine, CPU, 1) is engine
    other = replace(engine, decoder_target="tensorrt_llm")
    assert for_answers(other, CUDA, 1) is other
