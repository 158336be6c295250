"""vLLM reads the exports of the small trained model: are its answers those of our engine?

    python -m bench.peers.read_exports --folder D [--per_task N]

Needs vllm and a GPU. Makes every export and our FP8 engine in `folder`, what is missing, and asks
both the same pictures: greedily, with our scales, weights and KV cache in FP8. vLLM's own NVLM_D
class runs the export as it is; beside it stands a configuration class of this folder, in place of
NVIDIA's remote code, which the small model has not. Each export has a process of its own. The last
line is JSON. vLLM 0.33 puts one token more after each picture; num_prompt_tokens shows it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

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
_MAX_TOKENS = 20
_MEMORY_BYTES = 8 << 30

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
        options = BuildOptions(decoder="torch", vision="torch")
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


def ask_vllm(export: Path, asked: list[dict[str, str]], system: str) -> list[Answer]:
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
        max_num_seqs=16,
        seed=0,
    )
    prompts = [
        {
            "prompt": _PROMPT.format(system=system, question=each["question"]),
            "multi_modal_data": {"image": Image.open(each["image"]).convert("RGB")},
        }
        for each in asked
    ]
    found = model.generate(prompts, SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS))
    return [
        {"text": each.outputs[0].text, "num_prompt_tokens": len(each.prompt_token_ids)}
        for each in found
    ]


def compared(asked: list[dict[str, str]], ours: list[Answer], theirs: list[Answer]) -> Answer:
    pairs = list(zip(ours, theirs, strict=True))
    truths = [each["truth"] for each in asked]
    return {
        "num_questions": len(asked),
        "num_equal": sum(a["text"].strip() == b["text"].strip() for a, b in pairs),
        "num_same_prompt_tokens": sum(
            a["num_prompt_tokens"] == b["num_prompt_tokens"] for a, b in pairs
        ),
        "num_right": {
            name: sum(t in a["text"] for t, a in zip(truths, answers, strict=True))
            for name, answers in (("ours", ours), ("theirs", theirs))
        },
        "different": [(a["text"], b["text"]) for a, b in pairs if a["text"] != b["text"]][:8],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--per_task", type=int, default=50)
    parser.add_argument("--export", choices=EXPORTS, help="asks vLLM this one alone, on stdout")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    system = "Answer the questions."
    if arguments.export is not None:
        asked = json.loads((folder / "questions.json").read_text())
        print(json.dumps(ask_vllm(folder / arguments.export, asked, system)))
        return
    make(folder)
    asked = questions(folder, arguments.per_task)
    (folder / "questions.json").write_text(json.dumps(asked))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = ask_ours(folder / "engine", asked, device)
    result = {}
    for name in EXPORTS:
        command = [sys.executable, "-m", "bench.peers.read_exports", "--folder", str(folder)]
        done = subprocess.run(
            [*command, "--export", name], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            result[name] = {"error": f"vLLM ended with {done.returncode}; see the log above"}
            continue
        result[name] = compared(asked, ours, json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
