"""The trained small model: it reads through the programs a user runs, and only if all is in place.

Scores are of tools/tiny/evaluation.py: Pillow's drawing, fonts and words unseen in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch

from build.conversion.convert import ConvertOptions
from build.sources.hugging_face import model_config
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_names import model_tensors
from nvlm.inputs.prompt import tile_tags
from nvlm.inputs.tiling import choose_grid
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderRequest
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket
from tests.conftest import BF16, Workshop
from tests.support import ablations
from tests.support.ablations import Ablation
from tests.support.command import RUN, run_command
from tests.support.decoding import generate
from tools.tiny.curve import LOSSES, draw, read_runs
from tools.tiny.evaluation import TASKS, TILE_SIZE, Sample, samples, score, write_requests

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "nvlm-d-tiny"
CARD = json.loads((MODEL / "scores.json").read_text())
BARS = {
    "number": 0.95,
    "word": 0.9,
    "two_lines": 0.9,
    "colour": 0.95,
    "which_tile": 0.9,
    "tile_shows": 0.9,
}
FP8 = ConvertOptions()


@pytest.fixture(scope="module")
def reading_engine(workshop: Workshop) -> Path:
    checkpoint = workshop.checkpoint("tiny_model_checkpoint", MODEL, FP8)
    return workshop.engine("tiny_model_engine", checkpoint)


@pytest.fixture(scope="module")
def runner(reading_engine: Path) -> Iterator[Runner]:
    with Runner.open(reading_engine, torch.device("cpu")) as runner:
        yield runner


def answer(engine: Path, folder: Path, per_task: int) -> dict[str, float]:
    """Scores of the first questions of every task, asked as a user does."""
    requests, answers = write_requests(folder, per_task), folder / "answers.jsonl"
    files = ("--input_file", requests, "--output_file", answers, "--device", "cpu")
    result = run_command(RUN, "--engine_dir", engine, *files)
    assert result.exit_code == 0, result.stderr
    return score(answers)


def test_files_are_as_published_but_small() -> None:
    """Names, shapes and types of NVLM-D-72B at this size; dummy heads of zeros; equal tags."""
    config = model_config(MODEL)
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 26e6
    readers = [SafetensorsReader(path) for path in sorted(MODEL.glob("*.safetensors"))]
    stored = {name: reader.read(name) for reader in readers for name in reader.tensors}
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        t.name: (t.shape, t.dtype) for t in model_tensors(config)
    }
    vision = config.vision
    real = vision.num_attention_heads * vision.head_dim
    qkv = stored["vision_model.encoder.layers.0.attn.qkv.weight"].unflatten(0, (3, -1))
    assert vision.num_dummy_heads == 7
    assert qkv[:, :real].any()
    assert not qkv[:, real:].any()
    tokenizer = Tokenizer(MODEL)
    assert len({len(tokenizer.encode(tag)) for tag in tile_tags(7)}) == 1


def test_fifty_answers(reading_engine: Path, tmp_path: Path) -> None:
    scores = answer(reading_engine, tmp_path, 7)
    right = {task: round(7 * share) for task, share in scores.items()}
    assert set(right) == set(TASKS)
    assert sum(right.values()) >= 7 * len(TASKS) - 3, right
    assert min(right.values()) >= 6, right


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_cards_scores(precision: str, workshop: Workshop, tmp_path: Path) -> None:
    """Another processor may round one answer of a hundred into another."""
    options = FP8 if precision == "fp8" else BF16
    checkpoint = workshop.checkpoint(f"tiny_model_{precision}", MODEL, options)
    engine = workshop.engine(f"tiny_model_{precision}_engine", checkpoint)
    scores = answer(engine, tmp_path, CARD["per_task"])
    for task, share in scores.items():
        assert share == pytest.approx(CARD[precision][task], abs=0.011), task
        assert share >= BARS.get(task, 0.0), task


def test_the_card_reaches_the_bars_and_fp8_costs_a_point_at_most() -> None:
    for task in TASKS:
        assert CARD["fp8"][task] >= BARS.get(task, 0.9)
    means = {name: sum(CARD[name].values()) / len(TASKS) for name in ("fp8", "bf16")}
    assert means["fp8"] >= means["bf16"] - 0.01
    text = (MODEL / "README.md").read_text()
    for task in TASKS:
        row = f"| {task} | {CARD['fp8'][task]:.2f} | {CARD['bf16'][task]:.2f} |"
        assert row in text, f"the model card has no {row}"


def test_what_is_no_log_is_reported(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')
    for log in (tmp_path / "log.jsonl", tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=f"{log.name} is no log"):
            read_runs([log])


def test_the_cards_curve_is_drawn_from_all_runs(tmp_path: Path) -> None:
    runs = read_runs(sorted(MODEL.glob("training_*.jsonl")))
    last = sum(run[-1]["step"] for run in runs)
    figure = draw(runs)
    figure.savefig(tmp_path / "curve.svg")
    # A mark for each score: fonts may place texts elsewhere, the number of marks stays.
    drawn, shipped = ((d / "curve.svg").read_text().count("<use ") for d in (tmp_path, MODEL))
    assert drawn == shipped
    axes = figure.axes
    lines = {str(line.get_label()): line for plot in axes for line in plot.lines}
    assert set(LOSSES) | set(TASKS) - {"text"} <= set(lines)
    assert {float(max(lines[task].get_xdata())) for task in TASKS if task != "text"} == {last}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question whose image is encoded, and whether its answer is right as it stands."""

    expected: str
    encoded: DecoderRequest
    is_right: bool


@pytest.fixture(scope="module")
def asked(
    runner: Runner, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Asked, ...]]:
    """The first 12 questions of a task about pictures of more than one tile."""
    folder = tmp_path_factory.mktemp("asked")

    @cache
    def ask(task: str) -> tuple[Asked, ...]:
        several = (sample for sample in samples(task, 40) if is_cut(sample))
        return tuple(encode(runner, sample, folder) for sample in islice(several, 12))

    return ask


def is_cut(sample: Sample) -> bool:
    assert sample.image is not None
    return choose_grid(*sample.image.size, TILE_SIZE, 6) != (1, 1)


def encode(runner: Runner, sample: Sample, folder: Path) -> Asked:
    path = folder / f"{sample.id}.png"
    assert sample.image is not None
    sample.image.save(path)
    request = GenerationRequest.images_first(
        sample.question,
        (path,),
        system=sample.system,
        prompt_format="megatron" if sample.prompt_format == "megatron" else "hf",
        max_new_tokens=20,
    )
    ticket = Ticket(request)
    runner.prepare(ticket)
    runner.encode(ticket)
    encoded = ticket.decoder_request
    return Asked(sample.answer, encoded, answer_of(runner, encoded) == sample.answer)


def answer_of(runner: Runner, encoded: DecoderRequest) -> str:
    ((token_ids, _),) = generate(runner.decoder, [encoded])
    return runner.tokenizer.decode(token_ids)


def without(ablation: Ablation, runner: Runner, encoded: DecoderRequest) -> DecoderRequest:
    """The same question with one thing made wrong between encoder and decoder."""
    vision = runner.engine.vision_config
    vocab_size = runner.engine.checkpoint_config.decoder.vocab_size
    changed = ablation(encoded, vision.tokens_per_tile, vocab_size)
    # Other rows are another image: nothing cached of the true one may be taken for it.
    keys = tuple(ablation.__name__.encode() + key for key in changed.cache_keys)
    return replace(changed, cache_keys=keys)


@pytest.mark.parametrize(
    ("task", "ablation"),
    [
        ("tile_shows", ablations.shuffle_tiles),
        ("tile_shows", ablations.remove_tags),
        ("which_tile", ablations.swap_tags),
        ("count", ablations.remove_thumbnail),
        ("number", ablations.pixel_shuffle_v1),
    ],
)
def test_what_is_taken_away_was_used(
    task: str, ablation: Ablation, runner: Runner, asked: Callable[[str], tuple[Asked, ...]]
) -> None:
    """Each thing made wrong costs the task that needs it 20 points or more."""
    questions = asked(task)
    right = sum(question.is_right for question in questions)
    still = sum(
        answer_of(runner, without(ablation, runner, question.encoded)) == question.expected
        for question in questions
    )
    assert right >= 0.9 * len(questions)
    assert still <= right - 0.2 * len(questions), f"{right} right, {still} with {ablation.__name__}"
