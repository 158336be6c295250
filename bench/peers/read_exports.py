"""vLLM reads the exports of the small trained model: are its answers those of our engine?

    python -m bench.peers.read_exports --folder D [--per_task 50] [--output FILE]

Needs vllm and a GPU. Makes every export and our FP8 engine in `folder`, what is missing, and asks
both the same pictures: greedily, with our scales, weights and KV cache in FP8. vLLM's own NVLM_D
class runs the export as it is; beside it stands a configuration class of this folder, in place of
NVIDIA's remote code, which the small model has not. Each engine has a process and a log of its own,
and a time limit. FILE is written anew after each; the last line is JSON. vLLM 0.33 puts one token
more after each picture; num_prompt_tokens shows it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, describe_gpu
from bench.peers.own_process import run_alone
from build.conversion.convert import ConvertOptions, convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import COMPRESSED_TENSORS, MODELOPT
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.model.number_formats import FP8
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tools.tiny.evaluation import samples

MODEL = Path(__file__).resolve().parents[2] / "models" / "nvlm-d-tiny"
EXPORTS = {
    "modelopt": HuggingFaceFormat(MODELOPT, MODEL),
    "compressed-tensors": HuggingFaceFormat(COMPRESSED_TENSORS, MODEL),
    "compressed-tensors_fp8_vision": HuggingFaceFormat(
        COMPRESSED_TENSORS, MODEL, vision_format=FP8
    ),
}
TASKS = ("number", "word", "two_lines", "colour")
_CLASS = "configuration_nvlm_d"
_PROMPT = (
    "<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image>\n{question}<|im_end|>"
    "<|im_start|>assistant\n"
)
_SYSTEM = "Answer the questions."
_OURS = "ours"
_MAX_TOKENS = 20
_MAX_BATCH_SIZE = 16
_MEMORY_BYTES = 8 << 30
_SECONDS = 120  # of an engine's start and its answers

Answer = dict[str, Any]


def make(folder: Path) -> None:
    """The exports, the engine and the pictures that are missing."""
    cpu = torch.device("cpu")
    source = HuggingFaceSource(MODEL)
    for name, chosen in EXPORTS.items():
        place = folder / name
        if not place.exists():
            convert(source, place, ConvertOptions(), cpu, output_format=chosen)
            shutil.copyfile(Path(__file__).with_name(f"{_CLASS}.py"), place / f"{_CLASS}.py")
            path = place / layout.CONFIG
            values = json.loads(path.read_text())
            values["auto_map"] = {"AutoConfig": f"{_CLASS}.NVLM_D_Config"}
            path.write_text(json.dumps(values, indent=2))
    if not (folder / "engine").exists():
        if not (folder / "checkpoint").exists():
            convert(source, folder / "checkpoint", ConvertOptions(), cpu)
        options = BuildOptions(
            decoder="torch",
            vision="torch",
            vision_precision="bfloat16",
            max_batch_size=_MAX_BATCH_SIZE,
        )
        specification = specify(folder / "checkpoint", options, cpu, _MEMORY_BYTES)
        build_engine(specification, folder / "engine", options)


def questions(folder: Path, per_task: int) -> list[dict[str, str]]:
    """Pictures that the model never saw, in the prompt format of Hugging Face's code."""
    found = []
    for sample in chain.from_iterable(samples(task, per_task) for task in TASKS):
        assert sample.image is not None, "these tasks have pictures"
        path = folder / f"{sample.id}.png"
        sample.image.save(path)
        found.append({"image": str(path), "question": sample.question, "truth": sample.answer})
    return found


def ask_ours(engine_dir: Path, asked: list[dict[str, str]], device: torch.device) -> list[Answer]:
    answers = []
    with Runner.open(engine_dir, device) as runner:
        for each in asked:
            request = GenerationRequest.images_first(
                each["question"],
                (Path(each["image"]),),
                prompt_format="hf",
                max_new_tokens=_MAX_TOKENS,
            )
            result = runner.generate(request)
            answers.append({"text": result.text, "num_prompt_tokens": result.num_prompt_tokens})
    return answers


def ask_vllm(export: Path, asked: list[dict[str, str]]) -> list[Answer]:
    """Asks vLLM in this process, which vLLM holds until the process ends."""
    from PIL import Image
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(
        model=str(export),
        trust_remote_code=True,
        dtype="bfloat16",
        kv_cache_dtype="fp8",
        max_model_len=4096,
        gpu_memory_utilization=0.5,
        limit_mm_per_prompt={"image": 1},
        enforce_eager=True,
        max_num_seqs=_MAX_BATCH_SIZE,
        seed=0,
    )
    prompts = [
        {
            "prompt": _PROMPT.format(system=_SYSTEM, question=each["question"]),
            "multi_modal_data": {"image": Image.open(each["image"]).convert("RGB")},
        }
        for each in asked
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
    found = model.generate(prompts, sampling, use_tqdm=False)
    return [
        {"text": each.outputs[0].text, "num_prompt_tokens": len(each.prompt_token_ids)}
        for each in found
    ]


def compared(asked: list[dict[str, str]], ours: list[Answer], theirs: list[Answer]) -> Answer:
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "num_questions": len(asked),
        "num_right": num_right(asked, theirs),
        "num_equal": sum(a["text"].strip() == b["text"].strip() for a, b in pairs),
        "num_same_prompt_tokens": sum(
            a["num_prompt_tokens"] == b["num_prompt_tokens"] for a, b in pairs
        ),
        "different": [(a["text"], b["text"]) for a, b in pairs if a["text"] != b["text"]][:8],
    }


def num_right(asked: list[dict[str, str]], answers: list[Answer]) -> int:
    """How many answers hold the truth."""
    return sum(each["truth"] in answer["text"] for each, answer in zip(asked, answers, strict=True))


def measure(folder: Path, per_task: int) -> Iterator[dict[str, Any]]:
    """What is known after each engine."""
    make(folder)
    asked = questions(folder, per_task)
    _questions_file(folder).write_text(json.dumps(asked))
    result: dict[str, Any] = {"num_questions": len(asked)}
    ours: list[Answer] | None = None
    for name in (_OURS, *EXPORTS):
        start = time.perf_counter()
        arguments = ["-m", "bench.peers.read_exports", "--folder", str(folder), "--ask", name]
        error = run_alone(arguments, _SECONDS, folder / f"{name}.log")
        found: dict[str, Any] = {"seconds": time.perf_counter() - start}
        if error is not None:
            found["error"] = error
        else:
            answers = json.loads(_answers_file(folder, name).read_text())
            found["num_right"] = num_right(asked, answers)
            if name == _OURS:
                ours = answers
            elif ours is not None:
                found |= compared(asked, ours, answers)
        result[name] = found
        print(name, json.dumps(found), flush=True)
        yield result


def _ask(folder: Path, name: str) -> None:
    """Asks one engine in this process, and keeps its answers."""
    asked = json.loads(_questions_file(folder).read_text())
    if name == _OURS:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        answers = ask_ours(folder / "engine", asked, device)
    else:
        answers = ask_vllm(folder / name, asked)
    _answers_file(folder, name).write_text(json.dumps(answers))


def _questions_file(folder: Path) -> Path:
    return folder / "questions.json"


def _answers_file(folder: Path, name: str) -> Path:
    return folder / f"{name}_answers.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--per_task", type=int, default=50)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ask", choices=(_OURS, *EXPORTS), help="one engine, in this process")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if options.ask is not None:
        _ask(folder, options.ask)
        return
    result: dict[str, Any] = {}
    for result in measure(folder, options.per_task):
        if options.output is not None:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"machine": describe() | describe_gpu(device), **result}))


if __name__ == "__main__":
    main()
