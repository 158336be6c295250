"""Directories that many tests read: made once for a session, never written to by a test.

And the markers of whole rooms and files, by which `make check` leaves tests out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy.testing  # noqa: F401  starts lscpu once, which the guard would lay to some test
import pytest
import torch

from build.conversion.convert import ConvertOptions, convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.planning import hopper
from nvlm.program.process import set_up_cublas
from tests.support import guard
from tests.support.disks import mount  # noqa: F401 - a fixture
from tests.support.locks import locks_fail  # noqa: F401 - a fixture
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint
from tools.model_dir import Shape

if TYPE_CHECKING:
    from tests.support.triton_server import Served

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
TINY = PRESETS["tiny"]

HAS_HOPPER = torch.cuda.is_available() and hopper.has_kernels(torch.device("cuda"))
# Read when Triton and the kernels are imported.
if not HAS_HOPPER:
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    set_up_cublas(os.environ)

MARKS: dict[str, str] = {
    "bench/test_bench_hopper.py": "long",
    "bench/test_bench_vllm.py": "long",
    "commands/test_commands.py": "process",
    "commands/test_fidelity_float32.py": "long",
    "commands/test_fidelity_fp8.py": "long",
    "commands/test_export_killed.py": "process",
    "commands/test_kill.py": "process",
    "commands/test_offline.py": "process",
    "commands/test_production.py": "process",
    "commands/test_resume.py": "process",
    "commands/test_streams.py": "process",
    "decoder/test_change_logits.py": "kernels",
    "decoder/test_hopper_kernels_model.py": "kernels",
    "decoder/test_rank_kernels.py": "kernels",
    "decoder/test_kernels.py": "kernels",
    "decoder/test_kernels_compile.py": "process",
    "evaluation/test_evaluation_killed.py": "process",
    "evaluation/test_evaluation_page.py": "process",
    "evaluation/test_evaluation_ranks.py": "process",
    "evaluation/test_evaluation_shares.py": "process",
    "faults/test_both.py": "process",
    "faults/test_http_deaths.py": "process",
    "faults/test_http_restarts.py": "process",
    "faults/test_kills.py": "process",
    "frontends/test_openai_browser.py": "process",
    "frontends/test_openai_process.py": "process",
    "frontends/test_triton_dead_parts.py": "process",
    "fuzz": "long",
    "frontends/test_triton_scratch.py": "process",
    "frontends/test_triton_start.py": "process",
    "frontends/test_triton_tensorrt_llm.py": "process",
    "making/test_export_readers.py": "long",
    "making/test_vision_tensorrt.py": "long",
    "ranks/test_hopper_ranks.py": "process",
    "ranks/test_rank_failures.py": "process",
    "ranks/test_rank_hosts.py": "process",
    "ranks/test_rank_server.py": "process",
    "ranks/test_ranks.py": "process",
    "ranks/test_ranks_ahead.py": "process",
    "ranks/test_segments.py": "process",
    "test_project.py": "process",
    "test_reference.py": "long",
    "tools/test_tiny_model.py": "long",
    "vision/test_hopper_vision.py": "kernels",
}
"""Markers of every test of a folder or a file; a test that differs from its file bears its own."""

FIXTURE_MARKS = {"onnx_engine_dir": "long", "triton_server": "process"}
"""Markers of every test that asks for a fixture."""

LEFT_OUT_OF_CHECK = ("process", "kernels", "long", "slow")

# Under nohup programs would inherit that it is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Two workers share two cores (see Makefile), so each computes on one.
torch.set_num_threads(1)

# On a GPU Triton starts compilers, and nobody waits for `make check` there.
if not torch.cuda.is_available():
    guard.install()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by the tables above. The rest is marked `check`, in the JUnit file too."""
    for item in items:
        for path, marker in MARKS.items():
            if item.path.is_relative_to(TESTS / path):
                item.add_marker(marker)
        for fixture, marker in FIXTURE_MARKS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
        if not any(item.get_closest_marker(marker) for marker in LEFT_OUT_OF_CHECK):
            item.add_marker("check")
            item.user_properties.append(("check", "yes"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with guard.guarding(item):
        return (yield)


FP8 = ConvertOptions(calib_size=4)
BF16 = ConvertOptions(quant_algo=None, kv_cache_quant_algo=None)
FP32 = replace(BF16, dtype="float32")
MEMORY_BYTES = 24 << 30


@dataclass(frozen=True, slots=True)
class Workshop:
    """Makes model, checkpoint and engine directories below one folder."""

    root: Path

    def model(self, name: str, shape: Shape = TINY, *, seed: int = 0) -> Path:
        path = self.root / name
        if not path.exists():
            write_random_checkpoint(path, shape, seed=seed, max_shard_bytes=500_000)
        return path

    def checkpoint(self, name: str, model_dir: Path, options: ConvertOptions) -> Path:
        path = self.root / name
        if not path.exists():
            convert(HuggingFaceSource(model_dir), path, options, CPU)
        return path

    def engine(self, name: str, checkpoint_dir: Path, **options: object) -> Path:
        path = self.root / name
        if not path.exists():
            chosen = BuildOptions(**options)  # type: ignore[arg-type]
            build_engine(specify(checkpoint_dir, chosen, CPU, MEMORY_BYTES), path, chosen)
        return path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def fresh(tmp_path: Path) -> Workshop:
    """A workshop of the test's own, whose directories it may change."""
    return Workshop(tmp_path)


@pytest.fixture(scope="session")
def model_dir(workshop: Workshop) -> Path:
    return workshop.model("model")


@pytest.fixture(scope="session")
def checkpoint_dir(workshop: Workshop, model_dir: Path) -> Path:
    """FP8 weights and KV cache."""
    return workshop.checkpoint("checkpoint", model_dir, FP8)


@pytest.fixture(scope="session")
def engine_dir(workshop: Workshop, checkpoint_dir: Path) -> Path:
    """FP8 decoder, torch vision (no export), three images a request."""
    return workshop.engine("engine", checkpoint_dir, vision="torch", max_num_images=3)


@pytest.fixture(scope="session")
def float32_engine_dir(workshop: Workshop, model_dir: Path) -> Path:
    checkpoint = workshop.checkpoint("checkpoint_float32", model_dir, FP32)
    return workshop.engine("engine_float32", checkpoint, vision="torch", max_num_images=3)


@pytest.fixture(scope="session")
def onnx_engine_dir(workshop: Workshop, checkpoint_dir: Path) -> Path:
    """FP8 decoder, ONNX Runtime vision: what `build_engine.py` makes by default."""
    return workshop.engine("engine_onnx", checkpoint_dir, vision="onnxruntime", max_num_images=3)


@pytest.fixture(scope="session")
def triton_server(
    float32_engine_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A real Triton server in the `torch` form, which many tests ask."""
    from tests.support.triton_server import serving

    with serving(float32_engine_dir, tmp_path_factory.mktemp("triton")) as served:
        yield served


@pytest.fixture(scope="session")
def images() -> Callable[[str], Path]:
    """Golden pictures by file name."""
    return lambda name: TESTS / "data" / "images" / name
