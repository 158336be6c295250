"""vLLM's logits of an export of the 72B model's width, beside ours and beside an oracle.

    python -m bench.peers.export_logits --model_folder D --folder D [--layers 2] [--output FILE]
        [--readers NAME ...]

Needs a GPU, and vllm for the readers of exports; `--readers` asks only those that it names.
`model_folder` keeps a random model (bench.conversion.disk makes it); `folder` takes some 25 GB: the
calibrated checkpoint, and its text decoder exported in both formats. The same token ids go through
vLLM, through decoder torch, and through an oracle: transformers in float32 over the export's
dequantised weights, whose linears take inputs rounded by the export's static scales. vLLM gives log
probabilities of a prompt, so logits are compared less their mean over the vocabulary. A reader that
took other scales would be as far from the oracle as the oracle without input scales is. Errors are
relative 2-norms. Each step has a process of its own, a log and a time limit. FILE is written anew
after each; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from bench.conversion.disk import make_models, write_calibration
from bench.machine import describe, describe_gpu
from bench.peers.own_process import run_alone
from build.conversion.convert import ConvertOptions, convert
from build.engines.kv_cache import choose_kv_cache
from build.exports.checkpoint_source import CheckpointSource
from build.exports.export import export
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import COMPRESSED_TENSORS, MODELOPT
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.number_formats import FP8
from nvlm.planning import hopper
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import DecoderModel, SequenceStep
from runtime.decoder.models.torch_weights import load_weights, open_weights
from tests.support.tolerances import FAST_PATH_LOGITS, relative_error
from tools.make_random_checkpoint import PRESETS

NUM_TOKENS = 64
NUM_BLOCKS = 8
MAKE = "make"
FP8_CACHE, BF16_CACHE = "fp8", "bfloat16"
_SECONDS = 150  # of each step


@dataclass(frozen=True, slots=True)
class Reader:
    """Who computes logits, and how it holds keys and values."""

    name: str  # "ours", "oracle", or the export's format that vLLM reads
    cache: str  # of keys and values: FP8_CACHE or BF16_CACHE


ORACLE = Reader("oracle", BF16_CACHE)
WITHOUT_SCALES = Reader("oracle without input scales", BF16_CACHE)
OURS = {cache: Reader("ours", cache) for cache in (FP8_CACHE, BF16_CACHE)}
VLLM = (
    Reader(MODELOPT.name, FP8_CACHE),
    Reader(COMPRESSED_TENSORS.name, FP8_CACHE),
    Reader(COMPRESSED_TENSORS.name, BF16_CACHE),
)
READERS = {
    f"{reader.name}, {reader.cache} cache": reader
    for reader in (ORACLE, WITHOUT_SCALES, *OURS.values(), *VLLM)
}


def make(models: dict[int, Path], folder: Path, device: torch.device) -> None:
    """The calibrated checkpoint and both exports of its decoder, what is missing."""
    (model,) = models.values()
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        options = ConvertOptions(calib_data=write_calibration(folder))
        convert(HuggingFaceSource(model), checkpoint, options, device)
    for scheme in (MODELOPT, COMPRESSED_TENSORS):
        if not (folder / scheme.name).exists():
            chosen = HuggingFaceFormat(scheme, None, is_text_only=True)
            export(CheckpointSource(checkpoint), folder / scheme.name, chosen)


def token_ids(config: CheckpointConfig) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(
        0, config.decoder.vocab_size, (NUM_TOKENS,), generator=generator
    ).tolist()
    return ids


@torch.inference_mode()
def our_logits(checkpoint: Path, cache: str, device: torch.device) -> torch.Tensor:
    """[NUM_TOKENS, vocab_size]: half the tokens as a prompt, then one by one."""
    config = CheckpointConfig.read(checkpoint / layout.CONFIG)
    scales = "own" if cache == FP8_CACHE else "one"  # one of K and one of V, as an export has them
    kv_cache = choose_kv_cache(cache, scales, config, checkpoint)  # type: ignore[arg-type]
    model = _our_model(replace(config, kv_cache=kv_cache), checkpoint, device)
    ids, blocks = token_ids(config), list(range(NUM_TOKENS // TOKENS_PER_BLOCK))
    half = NUM_TOKENS // 2
    steps = [SequenceStep(ids[:half], 0, blocks, None, half)]
    steps += [SequenceStep([ids[i]], i, blocks, None, 1) for i in range(half, NUM_TOKENS)]
    return torch.cat([model.forward([step]).to("cpu", copy=True) for step in steps])


def _our_model(config: CheckpointConfig, checkpoint: Path, device: torch.device) -> DecoderModel:
    source = open_weights(checkpoint, config)
    if not hopper.takes_fast_path(config, device):
        return PlainModel(config, load_weights(source, config, device), NUM_BLOCKS, device)
    from runtime.decoder.kernels.triton_forms import TritonForms

    weights = load_hopper_weights(source, config, device)
    forms = TritonForms(device)
    return HopperModel(config, 1, NUM_TOKENS + 1, weights, NUM_BLOCKS, device, forms)


@torch.inference_mode()
def oracle_logits(export_dir: Path, device: torch.device, *, has_scales: bool) -> torch.Tensor:
    """[NUM_TOKENS, vocab_size] of transformers' Qwen2 in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(export_dir)
    del config.quantization_config
    with device:
        model: Any = Qwen2ForCausalLM(config)
    model.eval()
    assert model.dtype == torch.float32
    tensors = _tensors(export_dir)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        stored = tensors[name].to(device, torch.float32)
        scale = tensors.get(f"{name}_scale")
        parameter.copy_(stored if scale is None else stored * scale.to(device))
    for name, module in model.named_modules():
        scale = tensors.get(f"{name}.input_scale")
        if scale is not None and has_scales:
            assert isinstance(module, nn.Linear), name
            module.register_forward_pre_hook(_rounding(float(scale)))
    ids = token_ids(CheckpointConfig.read(export_dir.parent / "checkpoint" / layout.CONFIG))
    logits: torch.Tensor = model(torch.tensor([ids], device=device)).logits[0]
    return logits.float().cpu()


def _rounding(scale: float) -> Any:
    """A hook: a linear's input as FP8 with this scale holds it."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (FP8.dequantize(FP8.quantize(inputs[0], scale), scale), *inputs[1:])

    return hook


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(layout.ANY_WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def vllm_logits(export_dir: Path, cache: str) -> torch.Tensor:
    """[NUM_TOKENS - 1, vocab_size] of log probabilities. vLLM holds this process until it ends."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(
        model=str(export_dir),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        kv_cache_dtype=cache,
        max_model_len=4 * NUM_TOKENS,
        max_num_seqs=1,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        enforce_eager=True,
        max_logprobs=-1,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=-1,
        flat_logprobs=True,
    )
    config = CheckpointConfig.read(export_dir.parent / "checkpoint" / layout.CONFIG)
    ids, vocab_size = token_ids(config), config.decoder.vocab_size
    (answer,) = model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    found = answer.prompt_logprobs
    logits = torch.full((NUM_TOKENS - 1, vocab_size), torch.nan)
    # The first token has none. A position's first value is that of the token that follows.
    for row, start, end in zip(logits, found.start_indices[1:], found.end_indices[1:], strict=True):
        row[torch.tensor(found.token_ids[start:end])] = torch.tensor(found.logprobs[start:end])
    assert logits.isfinite().all(), "vLLM gave no log probability of some token"
    return logits


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(', ', '_').replace(' ', '_')}.pt"


def _compute(folder: Path, name: str, device: torch.device) -> None:
    """One reader's logits, in this process."""
    reader = READERS[name]
    if reader in (ORACLE, WITHOUT_SCALES):
        export_dir, has_scales = folder / COMPRESSED_TENSORS.name, reader is ORACLE
        logits = oracle_logits(export_dir, device, has_scales=has_scales)
    elif reader in OURS.values():
        logits = our_logits(folder / "checkpoint", reader.cache, device)
    else:
        logits = vllm_logits(folder / reader.name, reader.cache)
    torch.save(logits, _file(folder, name))


def compared(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Compares the positions that both have; a row's mean is no difference."""
    num_rows = min(len(found), len(expected))
    found, expected = (
        x[:num_rows].double() - x[:num_rows].double().mean(-1, keepdim=True)
        for x in (found, expected)
    )
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    same = found.argmax(-1) == expected.argmax(-1)
    return {
        "error": relative_error(found, expected),
        "largest_error_of_a_position": max(errors),
        "top1_share": float(same.double().mean()),
    }


def measure(
    model_folder: Path,
    folder: Path,
    num_layers: int,
    preset: str,
    device: torch.device,
    readers: Sequence[str] = tuple(READERS),
) -> Iterator[dict[str, Any]]:
    """What is known after each step."""
    result: dict[str, Any] = {"layers": num_layers, "num_tokens": NUM_TOKENS, "steps": {}}
    result["tolerance"] = FAST_PATH_LOGITS
    known: dict[Reader, torch.Tensor] = {}
    for name in (MAKE, *readers):
        start = time.perf_counter()
        arguments = ["-m", "bench.peers.export_logits", "--only", name]
        arguments += ["--folder", str(folder.parent)]
        arguments += ["--model_folder", str(model_folder), "--layers", str(num_layers)]
        arguments += ["--preset", preset, "--device", device.type]
        error = run_alone(arguments, _SECONDS, _file(folder, name).with_suffix(".log"))
        row: dict[str, Any] = {"seconds": time.perf_counter() - start}
        if error is not None:
            row["error"] = error
        elif name != MAKE:
            reader = READERS[name]
            logits = known[reader] = torch.load(_file(folder, name))
            if reader != ORACLE and ORACLE in known:
                row["from_oracle"] = compared(logits, known[ORACLE])
            ours = OURS[reader.cache]
            if reader in VLLM and ours in known:
                row["from_ours"] = compared(logits, known[ours])
        result["steps"][name] = row
        print(name, json.dumps(row), flush=True)
        yield result
        if name == MAKE and error is not None:
            return  # there is nothing to read


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model_folder", type=Path, help="by default `folder`")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="72b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--only", choices=(MAKE, *READERS), help="one step, in this process")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    # Another depth is another checkpoint.
    folder = options.folder.absolute() / f"{options.layers}_layers"
    folder.mkdir(parents=True, exist_ok=True)
    model_folder = (options.model_folder or options.folder).absolute()
    model_folder.mkdir(parents=True, exist_ok=True)
    if options.only == MAKE:
        depths = (options.layers,)
        make(make_models(model_folder, depths, options.preset, device.type), folder, device)
        return
    if options.only is not None:
        _compute(folder, options.only, device)
        return
    result: dict[str, Any] = {}
    where = model_folder, folder
    for result in measure(*where, options.layers, options.preset, device, options.readers):
        if options.output is not None:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"machine": describe() | describe_gpu(device), **result}))


if __name__ == "__main__":
    main()
