"""Other people's clients ask serve.py, each from an environment of its own (make setup-clients)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FP32, Workshop
from tests.support.command import ROOT
from tests.support.http_server import Served, serving

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="requirements/serving.txt is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(600)]

TRAINED = ROOT / "models" / "nvlm-d-tiny"
SCAN = ROOT / "examples" / "scan_1642.png"
CLIENTS = Path(sys.prefix) / "clients"
CLIENT_TIMEOUT_S = 300
NUM_REQUESTS = 6

MAKE_DATA = """
import sys
from datasets import Dataset, Features, Image, Value
rows = {"image": [sys.argv[1]] * 2, "question": ["Read the number."] * 2, "answer": ["1642", "7"]}
types = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
Dataset.from_dict(rows, features=types).to_parquet(sys.argv[2])
"""
TASK = """
task: numbers
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function numbers.pictures
doc_to_text: !function numbers.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def engine(workshop: Workshop) -> Path:
    checkpoint = workshop.checkpoint("served_checkpoint", TRAINED, FP32)
    return workshop.engine("served_engine", checkpoint, vision="torch", max_num_images=2)


@pytest.fixture(scope="module")
def served(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(engine, tmp_path_factory.mktemp("served")) as served:
        yield served


def client(name: str, folder: Path, *words: object, is_offline: bool = True) -> str:
    """Runs a program of a client's environment in `folder`, which is its home too. Its output."""
    environment, _, program = name.partition("/")
    path = CLIENTS / environment / "bin" / program
    if not path.exists():
        pytest.skip(f"{environment} is not installed; make setup-clients")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if is_offline else {}
    homes = {"HOME": str(folder), "HF_HOME": str(folder / "hf")}
    with tempfile.TemporaryDirectory() as short:  # the path of a socket in it has 107 bytes at most
        done = subprocess.run(
            [str(path), *map(str, words)],
            cwd=folder,
            env={**os.environ, **homes, **offline, "OPENAI_API_KEY": "none", "TMPDIR": short},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    return output


def answered(served: Served) -> float:
    samples = served.samples()
    names = [f'nvlm_requests_total{{outcome="{each}"}}' for each in ("stop", "length")]
    return sum(samples.get(name, 0.0) for name in names)


def test_aiperf_measures_streams_with_pictures(
    served: Served, engine: Path, tmp_path: Path
) -> None:
    before = answered(served)
    output = client(
        *("aiperf/aiperf", tmp_path, "profile", "--model", "nvlm-d", "--url", served.url),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", engine / "tokenizer"),
        *("--request-count", NUM_REQUESTS, "--concurrency", 2, "--isl", 32, "--osl", 8),
        *("--image-width-mean", 60, "--image-height-mean", 40, "--image-format", "png"),
        *("--ui", "none", "--no-gpu-telemetry", "--output-artifact-dir", tmp_path / "out"),
        is_offline=False,  # it refuses a local tokenizer then
    )
    found = tmp_path / "out" / "profile_export_aiperf.json"
    assert found.exists(), output[-5000:]
    body = json.loads(found.read_text())
    assert body["request_count"]["avg"] == NUM_REQUESTS
    assert not body["error_summary"]
    assert body["time_to_first_token"]["avg"] > 0
    assert body["usage_prompt_tokens"]["min"] > 256, "a picture was left out"
    assert answered(served) - before == NUM_REQUESTS
    metrics = (tmp_path / "out" / "server_metrics_export.csv").read_text()
    assert "nvlm_num_requests_running" in metrics


@pytest.mark.parametrize("kind", ["text", "image"])
def test_guidellm_measures_texts_and_pictures_without_text(
    served: Served, engine: Path, tmp_path: Path, kind: str
) -> None:
    data = {
        "text": "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "image": "kind=synthetic_image,width=67,height=44,output_tokens=8",
    }
    backend = f"kind=openai_http,target={served.url},model=nvlm-d"
    client(
        *("guidellm/guidellm", tmp_path, "run"),
        *("--backend", f"{backend},request_format=/v1/chat/completions"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={engine / 'tokenizer'}", "--data", data[kind]),
    )
    (benchmark,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    metrics: dict[str, Any] = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)
    assert metrics["output_token_count"]["successful"]["mean"] == 8, "ignore_eos"
    least = 256 if kind == "image" else 32
    assert metrics["prompt_token_count"]["successful"]["mean"] >= least


def test_lmms_eval_scores_a_task_of_ours(served: Served, tmp_path: Path) -> None:
    task, data = tmp_path / "tasks" / "numbers", tmp_path / "data.parquet"
    task.mkdir(parents=True)
    (task / "numbers.yaml").write_text(TASK.format(data=data))
    (task / "numbers.py").write_text(FUNCTIONS)
    client("lmms-eval/python", tmp_path, "-c", MAKE_DATA, SCAN, data)
    arguments = f"model=nvlm-d,base_url={served.url}/v1,timeout=60"
    output = client(
        *("lmms-eval/python", tmp_path, "-m", "lmms_eval", "--model", "openai"),
        *("--model_args", arguments, "--tasks", "numbers", "--batch_size", "1"),
        *("--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out"),
    )
    assert re.search(r"\|numbers\|.*\|exact_match\|.*\| *0\.5\|", output), output[-3000:]
