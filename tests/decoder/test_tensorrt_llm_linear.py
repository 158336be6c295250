"""Scales that are numbers of the dtype make TensorRT-LLM's linears compute what ours do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.dtypes import TORCH_DTYPES
from runtime.answers.compare import Run, differences, record
from runtime.decoder.block_allocator import num_blocks_for
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.models.open_model import OpenedModel
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.torch_weights import DecoderWeights, load_weights, open_weights
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.vision.executor import create_vision_executor
from tests.conftest import CPU, FP8, TINY, Workshop
from tests.reference.tensorrt_llm_linear import FP8Linear
from tests.support.command import ROOT
from tests.support.older_checkpoint import write_older_checkpoint
from tests.support.tolerances import FLOAT32_SCALES
from tools.tiny.evaluation import TASKS, samples

TRAINED = ROOT / "models" / "nvlm-d-tiny"
SEEDS = range(4)
PROMPTS = [torch.randint(400, (40,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
FORMS = pytest.mark.parametrize("is_plugin", [False, True], ids=["Q/DQ", "plugins"])


@pytest.fixture(scope="module")
def questions(workshop: Workshop) -> list[GenerationRequest]:
    """One of every task that the trained small model knows."""
    folder = workshop.root / "questions"
    folder.mkdir()
    requests = []
    for task in TASKS:
        (sample,) = samples(task, 1)
        pictures = () if sample.image is None else (folder / f"{task}.png",)
        for path in pictures:
            sample.image.save(path)
        requests.append(
            GenerationRequest.images_first(
                sample.question,
                pictures,
                prompt_format=sample.prompt_format,
                system=sample.system,
                max_new_tokens=8,
            )
        )
    return requests


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine's decoder in its plain form, with our linears."""

    engine: EngineDir
    weights: DecoderWeights

    @classmethod
    def read(cls, engine_dir: Path) -> Opened:
        engine = EngineDir.read(engine_dir)
        config = engine.checkpoint_config
        return cls(engine, load_weights(open_weights(engine_dir / "llm", config), config, CPU))

    def with_theirs(self, *, is_plugin: bool) -> Opened:
        """With TensorRT-LLM's linears, made of the file's tensors."""
        tensors = load_file(self.engine.directory / "llm" / "rank0.safetensors")
        opened = Opened.read(self.engine.directory)
        for i, layer in enumerate(opened.weights.layers):
            prefix = f"transformer.layers.{i}."
            theirs = {
                name: FP8Linear(
                    TORCH_DTYPES[self.engine.checkpoint_config.dtype],
                    tensors[f"{prefix}{name}.weight"],
                    tensors.get(f"{prefix}{name}.bias"),
                    tensors[f"{prefix}{name}.weights_scaling_factor"],
                    tensors[f"{prefix}{name}.activation_scaling_factor"],
                    is_plugin=is_plugin,
                )
                for name in DECODER_LINEARS
            }
            layer.linear = theirs.__getitem__  # type: ignore[method-assign, assignment]
        return opened

    def executor(self) -> TorchDecoderExecutor:
        num_blocks = num_blocks_for(self.engine.limits.max_seq_len)
        model = PlainModel(self.engine.checkpoint_config, self.weights, num_blocks, CPU)
        return TorchDecoderExecutor.over(self.engine, OpenedModel(model, num_blocks))

    def logits(self) -> torch.Tensor:
        """[prompts, vocab_size], of the token after each."""
        decoder = self.executor()
        for prompt in PROMPTS:
            decoder.submit(DecoderRequest(prompt.tolist(), 1, return_logits=True))
        found: dict[int, torch.Tensor | None] = {}
        while len(found) < len(PROMPTS):
            found |= {output.request_id: output.logits for output in decoder.step()}
        return torch.stack([found[request_id] for request_id in sorted(found)])

    def answers(self, requests: list[GenerationRequest]) -> Run:
        vision = create_vision_executor(self.engine, CPU)
        with Runner(self.engine, vision, self.executor()) as runner:
            return record(runner, requests)


@FORMS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_their_linears_give_our_logits_to_the_bit(
    workshop: Workshop, dtype: str, is_plugin: bool
) -> None:
    for seed in SEEDS:
        model_dir = workshop.model(f"model_of_seed_{seed}", TINY, seed=seed)
        options = replace(FP8, dtype=dtype)
        checkpoint = workshop.checkpoint(f"fp8_{dtype}_of_seed_{seed}", model_dir, options)
        ours = Opened.read(workshop.engine(f"fp8_{dtype}_of_{seed}", checkpoint, vision="torch"))
        assert torch.equal(ours.with_theirs(is_plugin=is_plugin).logits(), ours.logits())


@FORMS
def test_their_linears_give_the_trained_models_answers_to_the_bit(
    workshop: Workshop, questions: list[GenerationRequest], is_plugin: bool
) -> None:
    checkpoint = workshop.checkpoint("trained_fp8", TRAINED, FP8)
    ours = Opened.read(workshop.engine("trained_fp8_engine", checkpoint, vision="torch"))
    found = ours.with_theirs(is_plugin=is_plugin).answers(questions)
    for each, expected in zip(found.recordings, ours.answers(questions).recordings, strict=True):
        assert each.token_ids == expected.token_ids
        assert torch.equal(each.logits, expected.logits)


@FORMS
def test_with_float32_scales_their_logits_are_off(
    workshop: Workshop, questions: list[GenerationRequest], is_plugin: bool
) -> None:
    """By the mean of the trained model's answers, as long as both have the same tokens."""
    checkpoint = workshop.root / "trained_older"
    if not checkpoint.exists():
        write_older_checkpoint(TRAINED, checkpoint, FP8)
    ours = Opened.read(workshop.engine("trained_older_engine", checkpoint, vision="torch"))
    found = ours.with_theirs(is_plugin=is_plugin).answers(questions)
    rows = differences(found, ours.answers(questions))
    errors = [row.logit_error for row in rows if row.logit_error is not None]
    error = sum(errors) / len(errors)
    print(f"float32 scales: {error:.4f} in the mean of {len(errors)} answers, {errors}")
    low, high = FLOAT32_SCALES
    assert low < error < high
