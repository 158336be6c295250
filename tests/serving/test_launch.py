"""What a program sets in the environment before an engine loads, and which device it opens on."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from nvlm.formats import layout
from nvlm.planning import hopper
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderOptions
from runtime.engine import libraries
from runtime.engine.engine_dir import EngineDir
from runtime.engine.libraries import load_cudnn_beside, set_up_libraries
from runtime.serving.launch import Program, launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CUBLAS = {"CUBLASLT_WORKSPACE_SIZE": "0"}


def environment_of(engine: EngineDir, device: torch.device, **given: str) -> dict[str, str]:
    environment = dict(given)
    set_up_libraries(engine, device, environment)
    return environment


def test_cublas_gets_no_workspace_where_torch_has_kernels_unless_the_user_says_so(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replace(EngineDir.read(engine_dir), vision_executor="onnxruntime")
    assert environment_of(engine, CPU) == {}
    monkeypatch.setattr(hopper, "has_kernels", lambda device: device.type == "cuda")
    assert environment_of(engine, CUDA) == CUBLAS
    assert environment_of(engine, CPU) == {}
    given = {"CUBLASLT_WORKSPACE_SIZE": "16"}
    assert environment_of(engine, CUDA, **given) == CUBLAS | given
    other = replace(engine, decoder_target="tensorrt_llm")
    assert environment_of(other, CUDA) == {}
    assert environment_of(replace(other, vision_executor="torch"), CUDA) == CUBLAS


def test_kernels_that_an_engine_keeps_are_copied_where_torch_has_kernels(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[Path, Path]] = []
    monkeypatch.setattr(hopper, "has_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(libraries, "about_kernels", lambda _: {})
    monkeypatch.setattr(libraries, "kernel_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(libraries, "use_kernels", lambda *places: copied.append(places[:2]))
    engine = replace(EngineDir.read(engine_dir), directory=tmp_path)
    environment_of(engine, CUDA)
    (tmp_path / layout.KERNELS).mkdir()
    environment_of(engine, CPU)
    assert copied == []
    environment_of(engine, CUDA)
    assert copied == [(tmp_path, tmp_path / "cache")]


def test_what_launches_new_kernels_is_compiled_beside(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[list[tuple[str, ...]]] = []
    num_new = 0
    monkeypatch.setattr(hopper, "has_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(libraries, "about_kernels", lambda _: {})
    monkeypatch.setattr(libraries, "kernel_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(libraries, "use_kernels", lambda *_: num_new)
    monkeypatch.setattr(libraries, "compile_beside", compiled.append)
    engine = replace(EngineDir.read(engine_dir), directory=tmp_path)
    (tmp_path / layout.KERNELS).mkdir()
    (tmp_path / layout.KERNELS / layout.KERNEL_TYPES).write_text('[["*fp32", "i32"]]')
    environment_of(engine, CUDA)
    assert compiled == []
    num_new = 2
    environment_of(engine, CUDA)
    assert compiled == [[("*fp32", "i32")]]


def test_a_thread_beside_is_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would begin on GPU 0, and leave a context there."""
    chosen: list[int] = []

    def fail() -> None:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "Stream", fail)
    load_cudnn_beside(torch.device("cuda", 1))
    for thread in threading.enumerate():
        if thread.name == "nvlm-cudnn":
            thread.join()
    assert chosen == [1]


def test_nccl_is_set_up_for_ranks_of_torch(engine_dir: Path) -> None:
    engine = EngineDir.read(engine_dir)
    config = replace(engine.checkpoint_config, tp_size=2)
    ranks = replace(engine, checkpoint_config=config)
    assert environment_of(ranks, CPU)["NCCL_NVLS_ENABLE"] == "0"
    assert environment_of(ranks, CPU, NCCL_NVLS_ENABLE="1")["NCCL_NVLS_ENABLE"] == "1"
    assert environment_of(replace(ranks, decoder_target="tensorrt_llm"), CPU) == {}


def test_one_rank_leads_with_the_runner_of_its_engine(float32_engine_dir: Path) -> None:
    """And returns its exit code, also where a launcher started it alone."""

    def lead(device: torch.device, open_runner: object) -> int:
        assert device == CPU
        assert callable(open_runner)
        with open_runner() as runner:
            assert runner.engine.directory == float32_engine_dir
        return 7

    program = Program(float32_engine_dir, "cpu", DecoderOptions(), lead)
    assert launch({}, lambda: program) == 7
    assert launch({"PMI_SIZE": "1", "PMI_RANK": "0"}, lambda: program) == 7


def test_a_launcher_that_makes_no_sense_is_reported_before_the_command_line_is_read() -> None:
    with pytest.raises(UserError, match="PMI_SIZE=two"):
        launch({"PMI_SIZE": "two"}, partial(pytest.fail, "parsed"))
