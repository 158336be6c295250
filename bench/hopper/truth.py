"""Whether a GPU answers as the CPU does: the trained small model on its held-out questions.

    python -m bench.hopper.truth --folder D [--per_task 40] [--device cuda|cpu]

Makes what is missing in the folder: the FP8 engine, the questions with their pictures, and the
CPU's answers with logits (reference.pt), which take minutes and may be made on another machine.
Then asks on the device: as built, one question at a time, with prompts in chunks, and without CUDA
graphs. Answers are compared token by token, logits as long as both have seen the same tokens.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, describe_gpu
from build.conversion.convert import ConvertOptions, convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.program.process import set_up_cublas
from runtime.answers.compare import Run, differences, record
from runtime.decoder.models.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.vision.executor import create_vision_executor
from tools.tiny.evaluation import TASKS, samples

CPU = torch.device("cpu")
MODEL = Path(__file__).parents[2] / "models" / "nvlm-d-tiny"
MAX_BATCH_SIZE, MAX_NEW_TOKENS = 16, 20
_TABLES = 16  # of so many answers, one keeps its image embeddings, which take most room
VARIANTS: dict[str, dict[str, Any]] = {
    "as built": {},
    "one at a time": {"max_batch_size": 1},
    "chunks of 100 tokens": {"max_num_tokens": 100},
    "without graphs": {"use_graphs": False},
}


def engine_in(folder: Path, tp_size: int = 1) -> EngineDir:
    """That of several ranks has the scales of the one for one rank."""
    suffix = "" if tp_size == 1 else f"_{tp_size}"
    engine = folder / f"engine{suffix}"
    if not engine.exists():
        checkpoint = checkpoint_in(folder, tp_size, folder / f"checkpoint{suffix}")
        options = BuildOptions(
            decoder="torch",
            vision="torch",
            vision_precision="bfloat16",
            max_batch_size=MAX_BATCH_SIZE,
        )
        spec = specify(checkpoint, options, CPU, total_memory_bytes(CPU))
        build_engine(spec, engine, options)
    return EngineDir.read(engine)


def checkpoint_in(folder: Path, tp_size: int, checkpoint: Path) -> Path:
    if checkpoint.exists():
        return checkpoint
    report = None
    if tp_size > 1:
        report = checkpoint_in(folder, 1, folder / "checkpoint") / layout.REPORT
    options = ConvertOptions(tp_size=tp_size, calib_cache=report)
    convert(HuggingFaceSource(MODEL), checkpoint, options, CPU)
    return checkpoint


def questions(folder: Path, per_task: int) -> Iterator[GenerationRequest]:
    """The first `per_task` questions of every task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for sample in samples(task, per_task):
            picture = folder / f"{sample.id}.png"
            if sample.image is not None and not picture.exists():
                sample.image.save(picture)
            yield GenerationRequest.images_first(
                sample.question,
                () if sample.image is None else (picture,),
                prompt_format=sample.prompt_format,
                system=sample.system,
                max_new_tokens=MAX_NEW_TOKENS,
            )


def answers(
    engine: EngineDir,
    device: torch.device,
    requests: list[GenerationRequest],
    *,
    use_graphs: bool = True,
    **limits: int,
) -> Run:
    engine = replace(engine, limits=replace(engine.limits, **limits))
    vision = create_vision_executor(engine, device)
    decoder = TorchDecoderExecutor.over(engine, open_model(engine, device, use_graphs=use_graphs))
    with Runner(engine, vision, decoder) as runner:
        return record(runner, requests)


def kept(run: Run) -> Run:
    """What is stored of the reference; embeddings are bfloat16 numbers."""
    recordings = []
    for i, each in enumerate(run.recordings):
        table = None if i % _TABLES or each.prompt_table is None else each.prompt_table.bfloat16()
        recordings.append(replace(each, prompt_table=table))
    return Run(recordings, run.seconds)


def compared(found: Run, expected: Run) -> dict[str, Any]:
    """top1: of the rows of logits whose tokens before were the same."""
    rows = list(differences(found, expected))
    errors = [row.logit_error for row in rows if row.logit_error is not None]
    same, num_rows = 0, 0
    for row, ours, theirs in zip(rows, found.recordings, expected.recordings, strict=True):
        first = row.first_differing_token
        count = min(len(ours.logits), len(theirs.logits))
        count = count if first is None else min(count, first + 1)
        best = [x.logits[:count].argmax(-1) for x in (ours, theirs)]
        same, num_rows = same + int((best[0] == best[1]).sum()), num_rows + count
    return {
        "num_answers": len(rows),
        "equal_share": sum(row.first_differing_token is None for row in rows) / len(rows),
        "top1_share": same / num_rows,
        "max_logit_error": max(errors),
        "mean_logit_error": sum(errors) / len(errors),
        "max_vision_error": max(row.vision_error or 0.0 for row in rows),
        "margins": [row.margin for row in rows if row.first_differing_token is not None],
        "seconds": found.seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--per_task", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    set_up_cublas(os.environ)
    device = torch.device(options.device)
    options.folder.mkdir(parents=True, exist_ok=True)
    engine = engine_in(options.folder)
    requests = list(questions(options.folder / "pictures", options.per_task))
    stored = options.folder / f"reference_{options.per_task}.pt"
    if not stored.exists():
        torch.save(kept(answers(engine, CPU, requests)), stored)
        print(f"{stored.name} is made", file=sys.stderr, flush=True)
    expected = torch.load(stored, weights_only=False)
    found: dict[str, Any] = {"machine": describe() | describe_gpu(device)}
    runs: dict[str, Run] = {}
    for name, changes in VARIANTS.items():
        runs[name] = answers(engine, device, requests, **changes)
        found[name] = compared(runs[name], expected)
        print(name, json.dumps(found[name]), flush=True)
        if name != "as built":
            other = compared(runs[name], runs["as built"])
            found[f"{name}, beside as built"] = other
            print(f"{name}, beside as built", json.dumps(other), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
