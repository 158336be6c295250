"""What FP8 costs beside bfloat16: as another checkout converts, and as this one does.

    python -m bench.cpu.fp8_answers --folder D [--before DIR | --fp8_head] [--per_task 40]
        [--num_random 8]

Asks the trained small model its held-out questions, and models of random weights for the logits of
a first token. Each checkout converts in a process of its own; this one builds and runs what both
wrote. What the folder already has is not made again. --fp8_head measures --quantize_lm_head, and
leaves out vision in FP8 and the other KV caches. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.checkout import checkout
from bench.hopper.truth import CPU, MAX_BATCH_SIZE, MODEL, answers, compared, questions
from bench.machine import describe
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from nvlm.formats import layout
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.planning.device_memory import total_memory_bytes
from runtime.answers.compare import Run
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint
from tools.tiny.evaluation import TASKS, samples

ROOT = Path(__file__).parents[2]
RANDOM_QUESTIONS_PER_TASK = 4
BUILD = BuildOptions(
    decoder="torch", vision="torch", vision_precision="bfloat16", max_batch_size=MAX_BATCH_SIZE
)


@dataclass(frozen=True, slots=True)
class Maker:
    """A checkout that converts to `quant_algo`; options: what this one builds of it."""

    name: str
    root: Path
    quant_algo: str
    options: BuildOptions = BUILD
    flags: tuple[str, ...] = ()  # further ones of the conversion

    def engine(self, model_dir: Path, folder: Path) -> EngineDir:
        checkpoint = folder / f"checkpoint {self.name.partition(',')[0]}"
        if not checkpoint.exists():
            places = ("--model_dir", model_dir, "--output_dir", checkpoint, "--device", "cpu")
            flags = ("--quant_algo", self.quant_algo, *self.flags)
            program = (self.root / "convert_checkpoint.py", *places, *flags)
            subprocess.run([sys.executable, *map(str, program)], cwd=self.root, check=True)
        engine = folder / f"engine {self.name}"
        if not engine.exists():
            spec = specify(checkpoint, self.options, CPU, total_memory_bytes(CPU))
            build_engine(spec, engine, self.options)
        return EngineDir.read(engine)


def makers(before: Path | None, *, has_fp8_head: bool) -> Iterator[Maker]:
    """The first is what the others are compared with."""
    yield Maker("bfloat16", ROOT, "none")
    if has_fp8_head:
        yield Maker("FP8", ROOT, "FP8")
        yield Maker("FP8 head", ROOT, "FP8", flags=("--quantize_lm_head",))
        return
    for name, root in (("FP8 before", before), ("FP8 after", ROOT)):
        if root is not None:
            yield Maker(name, root, "FP8")
            yield Maker(f"{name}, vision too", root, "FP8", replace(BUILD, vision_precision="FP8"))
    own, plain = replace(BUILD, kv_cache_scales="own"), replace(BUILD, kv_cache_dtype="bfloat16")
    yield Maker("FP8 after, own KV scales", ROOT, "FP8", own)
    yield Maker("FP8 after, bfloat16 KV", ROOT, "FP8", plain)


def right(run: Run, engine: EngineDir, per_task: int) -> list[bool]:
    """Whether each answer is exactly the expected string."""
    tokenizer = Tokenizer(engine.directory / layout.TOKENIZER)
    expected = [sample.answer for task in TASKS for sample in samples(task, per_task)]
    texts = [tokenizer.decode(recording.token_ids) for recording in run.recordings]
    return [text == answer for text, answer in zip(texts, expected, strict=True)]


def trained(makers: Sequence[Maker], folder: Path, per_task: int) -> list[dict[str, Any]]:
    """One row a maker: right answers, and what differs from bfloat16."""
    requests = list(questions(folder / "pictures", per_task))
    rows: list[dict[str, Any]] = []
    exact: Run | None = None
    first: list[bool] = []
    for maker in makers:
        engine = maker.engine(MODEL, folder)
        run = answers(engine, CPU, requests)
        hits = right(run, engine, per_task)
        exact, first = exact or run, first or hits
        found = compared(run, exact)
        rows.append(
            {
                "name": maker.name,
                "num_right": sum(hits),
                "num_gained": sum(b and not a for a, b in zip(first, hits, strict=True)),
                "num_lost": sum(a and not b for a, b in zip(first, hits, strict=True)),
                "num_questions": len(hits),
                "equal_share": found["equal_share"],
                "mean_logit_error": found["mean_logit_error"],
                "max_logit_error": found["max_logit_error"],
                "max_vision_error": found["max_vision_error"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def random_models(makers: Sequence[Maker], folder: Path, num_models: int) -> list[dict[str, Any]]:
    """One row a maker: the relative errors of a first token's logits, one a model."""
    requests: list[GenerationRequest] = [
        replace(request, max_new_tokens=1)
        for request in questions(folder / "pictures", RANDOM_QUESTIONS_PER_TASK)
    ]
    errors: dict[str, list[float]] = {}
    for seed in range(num_models):
        model_dir = folder / f"random {seed}"
        if not model_dir.exists():
            write_random_checkpoint(model_dir, PRESETS["tiny"], seed=seed)
        exact: Run | None = None
        for maker in makers:
            run = answers(maker.engine(model_dir, folder / f"of random {seed}"), CPU, requests)
            exact = exact or run
            errors.setdefault(maker.name, []).append(compared(run, exact)["mean_logit_error"])
    rows = [
        {"name": name, "mean_logit_error": statistics.mean(each), "of_each_model": each}
        for name, each in errors.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--before", type=checkout, help="another checkout, to compare with")
    parser.add_argument("--per_task", type=int, default=40)
    parser.add_argument("--num_random", type=int, default=8)
    parser.add_argument("--fp8_head", action="store_true", help="measure --quantize_lm_head")
    options = parser.parse_args(arguments)
    if options.fp8_head and options.before is not None:
        parser.error("--fp8_head compares this checkout alone, found --before; give one of them")
    chosen = tuple(makers(options.before, has_fp8_head=options.fp8_head))
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": describe(),
        "random": random_models(chosen, folder, options.num_random),
        "trained": trained(chosen, folder, options.per_task),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
