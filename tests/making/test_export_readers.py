"""An export of the text decoder, run by transformers and compressed-tensors: what it computes is
what our engine of the same weights computes, and the small trained model answers alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from build.conversion.convert import ConvertOptions, convert
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import COMPRESSED_TENSORS
from build.sources.hugging_face import HuggingFaceSource
from nvlm.inputs.tokenizer import IM_END
from runtime.decoder.executor import DecoderRequest
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket
from tests.conftest import CPU, FP8, Workshop
from tests.support.decoding import engine_logits, generate
from tests.support.tolerances import EXPORT_LOGITS, EXPORT_LOGITS_RANDOM, relative_error
from tools.tiny.evaluation import TASKS, Sample, samples

pytest.importorskip("compressed_tensors", reason="requirements/test.txt installs it")

TRAINED = Path(__file__).resolve().parents[2] / "models" / "nvlm-d-tiny"
NUM_STEPS = 64
MOST_TOKENS, PER_TASK = 20, 6


FP8_HEAD = replace(FP8, quantize_lm_head=True)


def load(workshop: Workshop, name: str, model_dir: Path, options: ConvertOptions = FP8) -> Any:
    """The text export as transformers loads it: FP8 weights, inputs and KV cache."""
    from transformers import AutoModelForCausalLM

    folder = workshop.root / name
    if not folder.exists():
        chosen = HuggingFaceFormat(COMPRESSED_TENSORS, model_dir, is_text_only=True)
        convert(HuggingFaceSource(model_dir), folder, options, CPU, output_format=chosen)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # vLLM's alone: transformers does not quantise queries.
    assert all(name.endswith(".self_attn.q_scale") for name in info["unexpected_keys"])
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn
    assert (model.lm_head.weight.dtype == torch.float8_e4m3fn) == options.quantize_lm_head
    return model.eval()


@pytest.fixture(scope="module")
def trained_engine(workshop: Workshop) -> Path:
    checkpoint = workshop.checkpoint("tiny_model_checkpoint", TRAINED, FP8)
    return workshop.engine("tiny_model_engine_torch", checkpoint, vision="torch")


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Any:
    return load(workshop, "tiny_model_text_export", TRAINED)


def embeddings(model: Any, request: DecoderRequest) -> torch.Tensor:
    """[1, num_tokens, hidden_size]: virtual tokens are rows of the prompt table."""
    vocab_size = model.config.vocab_size
    ids = torch.tensor(request.token_ids)
    rows = model.get_input_embeddings().weight.detach()[ids.clamp(max=vocab_size - 1)].clone()
    is_virtual = ids >= vocab_size
    if is_virtual.any():
        assert request.prompt_table is not None
        rows[is_virtual] = request.prompt_table[ids[is_virtual] - vocab_size].to(rows.dtype)
    return rows[None]


def encoded(runner: Runner, sample: Sample, folder: Path) -> DecoderRequest:
    """What our decoder is asked."""
    paths: tuple[Path, ...] = ()
    if sample.image is not None:
        paths = (folder / f"{sample.id}.png",)
        sample.image.save(paths[0])
    ticket = Ticket(
        GenerationRequest.images_first(
            sample.question,
            paths,
            system=sample.system,
            prompt_format="megatron" if sample.prompt_format == "megatron" else "hf",
            max_new_tokens=MOST_TOKENS,
        )
    )
    runner.prepare(ticket)
    runner.encode(ticket)
    return ticket.decoder_request


@torch.inference_mode()
def forced(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits of each step where `tokens` follow the prompt, by cached decoding."""
    output = model(input_ids=torch.tensor([prompt]), use_cache=True)
    rows = [output.logits[0, -1].float()]
    for token in tokens[:-1]:
        past = output.past_key_values
        output = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
        rows.append(output.logits[0, -1].float())
    return torch.stack(rows)


@torch.inference_mode()
def greedy(model: Any, inputs: torch.Tensor, stop: int, most: int) -> list[int]:
    output = model(inputs_embeds=inputs, use_cache=True)
    tokens: list[int] = []
    while True:
        token = int(output.logits[0, -1].argmax())
        if token == stop or len(tokens) == most:
            return tokens
        tokens.append(token)
        past = output.past_key_values
        output = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)


def test_logits_over_64_tokens_are_ours_within_fp8(trained: Any, trained_engine: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, NUM_STEPS), generator=generator).tolist()
    prompt, tokens = ids[0], ids[1]
    found, wanted = forced(trained, prompt, tokens), engine_logits(trained_engine, prompt, tokens)
    error = relative_error(found, wanted)
    agreement = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    print(f"trained: error {error:.4f}, top-1 {agreement:.3f}")
    assert error <= EXPORT_LOGITS


def test_logits_of_a_head_in_fp8_are_ours_too(workshop: Workshop) -> None:
    model = load(workshop, "tiny_model_text_export_fp8_head", TRAINED, FP8_HEAD)
    checkpoint = workshop.checkpoint("tiny_model_checkpoint_fp8_head", TRAINED, FP8_HEAD)
    engine = workshop.engine("tiny_model_engine_fp8_head", checkpoint, vision="torch")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, NUM_STEPS), generator=generator).tolist()
    found, wanted = forced(model, ids[0], ids[1]), engine_logits(engine, ids[0], ids[1])
    error = relative_error(found, wanted)
    print(f"trained, FP8 head: error {error:.4f}")
    assert error <= EXPORT_LOGITS


def test_logits_of_a_random_model_too(
    workshop: Workshop, model_dir: Path, engine_dir: Path
) -> None:
    """Its attention is sharp, which multiplies every rounding."""
    model = load(workshop, "random_text_export", model_dir)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (2, NUM_STEPS), generator=generator).tolist()
    found, wanted = forced(model, ids[0], ids[1]), engine_logits(engine_dir, ids[0], ids[1])
    error = relative_error(found, wanted)
    print(f"random: error {error:.4f}")
    assert error <= EXPORT_LOGITS_RANDOM


@pytest.mark.parametrize("task", TASKS)
def test_the_small_trained_model_answers_alike(
    task: str, trained: Any, trained_engine: Path, tmp_path: Path
) -> None:
    """Pictures that it never saw: its decoder runs in transformers, on the image embeddings of our
    engine."""
    with Runner.open(trained_engine, CPU) as runner:
        stop = runner.tokenizer.special_id(IM_END)
        for sample in samples(task, PER_TASK):
            request = encoded(runner, sample, tmp_path)
            ((wanted, _),) = generate(runner.decoder, [request])
            found = greedy(trained, embeddings(trained, request), stop, MOST_TOKENS)
            assert runner.tokenizer.decode(found) == runner.tokenizer.decode(wanted), sample.id
