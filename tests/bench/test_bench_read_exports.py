"""What reads exports, with a double of vLLM: folders, pictures, processes, what is counted.

The double stands in a folder of its own, since every reader is a process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bench.peers import export_logits, read_exports
from bench.peers.own_process import VLLM_ENVIRONMENT, run_alone
from bench.peers.read_exports import EXPORTS, ask_ours, compared, make, questions
from tests.support.command import ROOT

# By its folder an export is read, refused or read for ever. Log lines come on stdout, as vLLM's do.
DOUBLE = """
import json, os, time
from pathlib import Path
from types import SimpleNamespace
import torch

class SamplingParams:
    def __init__(self, **named):
        self.named = named

class LLM:
    def __init__(self, model, **named):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert named["enforce_eager"]
        self.model = Path(model)
        if self.model.name == "modelopt":
            raise ValueError("no scale of k_proj")
    def generate(self, prompts, sampling, use_tqdm):
        print("INFO 2026 llm.py: done")
        return [self.answer(prompt, sampling) for prompt in prompts]
    def answer(self, prompt, sampling):
        if "prompt_logprobs" not in sampling.named:
            assert prompt["multi_modal_data"]["image"].mode == "RGB"
            text = SimpleNamespace(text="no")
            return SimpleNamespace(outputs=[text], prompt_token_ids=[0])
        ids = prompt["prompt_token_ids"]
        logits = torch.load(self.model.parent / "oracle_bfloat16_cache.pt")
        rows = logits[:-1].log_softmax(-1)
        found = SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
        for row, follows in zip(rows, ids[1:]):
            order = [follows, *row.argsort(descending=True).tolist()]
            found.start_indices.append(len(found.token_ids))
            found.token_ids += order
            found.logprobs += row[order].tolist()
            found.end_indices.append(len(found.token_ids))
        return SimpleNamespace(prompt_logprobs=found)
"""


@pytest.fixture
def double(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that imports the double."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "vllm.py").write_text(DOUBLE)
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(module: str, environment: dict[str, str], *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.slow
def test_exports_are_made_asked_and_compared(tmp_path: Path) -> None:
    make(tmp_path)
    for name in EXPORTS:
        config = AutoConfig.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert config.get_text_config().num_hidden_layers == 5
        assert config.quantization_config["kv_cache_scheme"]["num_bits"] == 8
    asked = questions(tmp_path, 1)
    assert len(asked) == len(read_exports.TASKS)
    ours = ask_ours(tmp_path / "engine", asked, torch.device("cpu"))
    same = compared(asked, ours, ours)
    assert same["num_equal"] == same["num_same_prompt_tokens"] == len(asked)
    assert same["num_right"] >= len(asked) - 1
    other = [{"text": "no", "num_prompt_tokens": 1} for _ in ours]
    found = json.loads(json.dumps(compared(asked, ours, other)))
    assert (found["num_equal"], found["num_right"]) == (0, 0)
    assert len(found["different"]) == len(asked)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.slow
def test_a_reader_that_fails_leaves_the_others_their_results(
    tmp_path: Path, double: dict[str, str]
) -> None:
    flags = ("--folder", str(tmp_path / "exports"), "--per_task", "1")
    output = tmp_path / "results.json"
    found = run("bench.peers.read_exports", double, *flags, "--output", str(output))
    assert json.loads(output.read_text()).items() <= found.items()
    assert found["ours"]["num_right"] >= len(read_exports.TASKS) - 1
    assert "ValueError: no scale of k_proj" in found["modelopt"]["error"]
    for name in ("compressed-tensors", "compressed-tensors_fp8_vision"):
        assert found[name]["num_equal"] == 0
        assert len(found[name]["different"]) == len(read_exports.TASKS)


@pytest.mark.process
@pytest.mark.slow
def test_logits_are_compared_with_ours_and_the_oracles(
    tmp_path: Path, double: dict[str, str]
) -> None:
    """The double's logits are the oracle's, whose distance from ours is that of ours from it."""
    output = tmp_path / "results.json"
    flags = ("--folder", str(tmp_path / "wide"), "--preset", "tiny", "--device", "cpu")
    found = run("bench.peers.export_logits", double, *flags, "--output", str(output))
    assert json.loads(output.read_text()).items() <= found.items()
    steps = found["steps"]
    assert list(steps) == [export_logits.MAKE, *export_logits.READERS]
    assert "ValueError: no scale of k_proj" in steps["modelopt, fp8 cache"]["error"]
    for cache in ("fp8", "bfloat16"):
        ours, theirs = steps[f"ours, {cache} cache"], steps[f"compressed-tensors, {cache} cache"]
        assert theirs["from_oracle"]["error"] < 1e-6
        assert theirs["from_oracle"]["top1_share"] == 1.0
        error = ours["from_oracle"]["error"]
        assert 0 < error < 0.25
        assert theirs["from_ours"]["error"] == pytest.approx(error, rel=0.1)
    without = steps["oracle without input scales, bfloat16 cache"]["from_oracle"]["error"]
    assert steps["ours, bfloat16 cache"]["from_oracle"]["error"] < without


def test_each_depth_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another depth left there is not measured as this one's."""
    made: list[Path] = []
    monkeypatch.setattr(export_logits, "make_models", lambda *_: {})
    monkeypatch.setattr(export_logits, "make", lambda _, folder, device: made.append(folder))
    for layers in ("2", "4"):
        flags = ["--folder", str(tmp_path), "--layers", layers, "--device", "cpu"]
        export_logits.main([*flags, "--only", export_logits.MAKE])
    assert made == [tmp_path / "2_layers", tmp_path / "4_layers"]


def test_errors_are_those_of_all_but_a_rows_mean() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    same = export_logits.compared(logits[:2].log_softmax(-1), logits)
    assert same["error"] < 1e-6
    assert same["top1_share"] == 1.0
    other = export_logits.compared(logits * 1.1, logits)
    assert other["error"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.process
def test_a_process_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        error = run_alone(["-c", code], 2.0, tmp_path / "log")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error is not None
    assert error.startswith("not done after 2 s")
    child = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.process
def test_a_process_is_offline_and_its_errors_are_named(tmp_path: Path) -> None:
    code = (
        "import os, sys; "
        f"assert all(os.environ[name] for name in {sorted(VLLM_ENVIRONMENT)}); "
        "print('RuntimeError: the cause'); print('later\\n' * 40); sys.exit(3)"
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        error = run_alone(["-c", code], 30, tmp_path / "log")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error is not None
    assert error.startswith("ended with 3\nRuntimeError: the cause\nlater")
