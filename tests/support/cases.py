"""The (model, images, prompt) cases that the fidelity tests share, and what runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from runtime.decoder.executor import DecoderExecutor, DecoderRequest, StepOutput
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.reference import internvit_float64, prompts, qwen2_hugging_face, tiling
from tools.model_dir import Shape

IMAGES = Path(__file__).parents[1] / "data" / "images"
PHOTO = Path(__file__).parents[2] / "examples" / "coffee.jpg"


@dataclass(frozen=True, slots=True)
class Question:
    """`num_tiles`: of each image, with grids of at most 6."""

    text: str
    paths: tuple[Path, ...] = ()
    num_tiles: tuple[int, ...] = ()


ONE_TILE = Question("What is this?", (IMAGES / "photo_36x36.png",), (1,))
SEVEN_TILES = Question("Describe this image in one sentence.", (PHOTO,), (7,))
THREE_IMAGES = Question(
    "How many shapes are there?",
    tuple(IMAGES / f"{n}.png" for n in ("portrait_400x1000", "pixel_1x1", "landscape_800x450")),
    (4, 1, 3),
)
TEXT_ONLY = Question("The quick brown fox jumps over the")


@dataclass(frozen=True, slots=True)
class Case:
    heads: int
    key_value_heads: int
    head_dim: int
    question: Question
    seed: int
    image_size: int = 56
    num_layers: int = 2

    @property
    def shape(self) -> Shape:
        return Shape(
            hidden_size=self.heads * self.head_dim,
            intermediate_size=256,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            image_size=self.image_size,
        )

    @property
    def name(self) -> str:
        ratio, tiles = self.heads // self.key_value_heads, sum(self.question.num_tiles)
        return (
            f"ratio{ratio}-dim{self.head_dim}-{len(self.question.paths)}images-{tiles}tiles-"
            f"{self.image_size}px-{self.num_layers}layers-{self.seed}"
        )

    def request(self, num_steps: int) -> GenerationRequest:
        question = self.question
        return GenerationRequest.images_first(
            question.text, question.paths, max_new_tokens=num_steps
        )


QUESTIONS = (ONE_TILE, SEVEN_TILES, THREE_IMAGES, TEXT_ONLY)
_GROUPS = ((2, 2), (4, 1), (8, 1))  # GQA ratios 1, 4, 8
_HEAD_DIMS = (64, 80, 96, 128)

# Every ratio with every head size, the questions going round; then each question twice more.
CASES = [
    Case(*group, head_dim, QUESTIONS[(i + j) % 4], seed=10 * i + j)
    for i, group in enumerate(_GROUPS)
    for j, head_dim in enumerate(_HEAD_DIMS)
] + [
    Case(4, 2, 64, question, seed=100 + i, image_size=size)
    for i, (question, size) in enumerate(
        [(question, 112) for question in QUESTIONS]
        + [(ONE_TILE, 448), (SEVEN_TILES, 448), (THREE_IMAGES, 28), (TEXT_ONLY, 28)]
    )
]


class RecordingDecoder:
    """A `DecoderExecutor` that asks for logits and lets no stop token end an answer."""

    def __init__(self, decoder: DecoderExecutor) -> None:
        self.decoder = decoder
        self.limits = decoder.limits
        self.requests: list[DecoderRequest] = []
        self.logits: list[torch.Tensor] = []

    def submit(self, request: DecoderRequest) -> int:
        self.requests.append(request)
        return self.decoder.submit(replace(request, stop_ids=frozenset(), return_logits=True))

    def step(self) -> list[StepOutput]:
        outputs = self.decoder.step()
        self.logits += [output.logits for output in outputs if output.logits is not None]
        return outputs

    def cancel(self, request_id: int) -> None:
        self.decoder.cancel(request_id)

    def close(self) -> None:
        self.decoder.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """token_ids [num_steps]; logits [num_steps, vocab_size]; prompt as submitted."""

    token_ids: list[int]
    logits: torch.Tensor
    request: DecoderRequest


def ours(engine_dir: Path, case: Case, num_steps: int) -> Answer:
    """The product's answer, through tiling, vision executor, prompt, table and decoder."""
    runner = Runner.open(engine_dir, torch.device("cpu"))
    recorder = RecordingDecoder(runner.decoder)
    runner = Runner(EngineDir.read(engine_dir), runner.vision, recorder)
    result = runner.generate(case.request(num_steps))
    return Answer(result.token_ids, torch.stack(recorder.logits), recorder.requests[0])


@dataclass(frozen=True, slots=True)
class Reference:
    """Hugging Face's Qwen2 on image embeddings of the float64 InternViT."""

    model: torch.nn.Module
    inputs_embeds: torch.Tensor  # [1, num_tokens, hidden_size]
    token_ids: list[int | None]  # of the prompt, None at image positions


def reference(model_dir: Path, case: Case) -> Reference:
    """Everything from the published files by code that is not ours."""
    config = internvit_float64.read_config(model_dir)
    tiles = [
        tiling.tiles(Image.open(path), config["max_dynamic_patch"], case.image_size)
        for path in case.question.paths
    ]
    assert tuple(len(t) for t in tiles) == case.question.num_tiles
    tokenizer = prompts.load_tokenizer(model_dir / "tokenizer.json")
    tokens_per_tile = (case.image_size // 28) ** 2
    token_ids = prompts.hugging_face(
        tokenizer, case.question.text, [len(t) for t in tiles], tokens_per_tile
    )
    model = qwen2_hugging_face.load(model_dir)
    pad = tokenizer.convert_tokens_to_ids(prompts.PAD)
    rows = None
    if tiles:
        embeddings = internvit_float64.encode_tiles(model_dir, np.concatenate(tiles))
        rows = embeddings.reshape(-1, embeddings.shape[-1])
    return Reference(
        model,
        qwen2_hugging_face.embed(model, token_ids, pad if tiles else None, rows),
        [None if token_id == pad else token_id for token_id in token_ids],
    )


def teacher_forced(
    engine_dir: Path, case: Case, tokens: list[int]
) -> tuple[torch.Tensor, DecoderRequest]:
    """Logits [len(tokens), vocab_size] where each prefix of `tokens` is given, not generated."""
    runner = Runner.open(engine_dir, torch.device("cpu"))
    recorder = RecordingDecoder(runner.decoder)
    Runner(EngineDir.read(engine_dir), runner.vision, recorder).generate(case.request(1))
    prompt = recorder.requests[0]
    for count in range(1, len(tokens)):
        longer = replace(prompt, token_ids=prompt.token_ids + tokens[:count], max_new_tokens=1)
        recorder.submit(longer)
        recorder.step()
    return torch.stack(recorder.logits), prompt
