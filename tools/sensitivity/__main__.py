"""Measures what each part in FP8, alone, does to the whole model's answers.

    python -m tools.sensitivity --checkpoint_dir BF16 --report FP8/quantization_report.json

`--checkpoint_dir` is a conversion with --quant_algo none, which must fit this machine's memory;
`--report` is of a conversion of the same weights in FP8. The unquantised model answers each
question greedily. Then one part at a time is in FP8 and is given the same answers token by token.
For each part: the logits' relative error, the mean Kullback-Leibler divergence of the next token
in nats, and how many answers would begin to differ. Worst first; --output writes JSON.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from build.conversion.calibration.calibration_set import BUILT_IN, load_calibration_set
from build.conversion.report.quantization_report import QuantizationReport
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.manifest import read_manifest
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.inputs.tiling import normalize
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.model.config import NVLMConfig
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import UNQUANTIZED
from nvlm.model.vision import VISION_FORMAT, VisionModel
from nvlm.program.command_line import ArgumentParser, positive_int, resolve_device, run
from nvlm.program.errors import UserError
from nvlm.program.json_files import write_json_beside
from tools.sensitivity.parts import GROUPINGS, Part, parts
from tools.sensitivity.whole_model import SequenceAttention, WholeModel

log = logging.getLogger("nvlm.sensitivity")

_TILES_AT_A_TIME = 7


@dataclass(frozen=True, slots=True)
class Question:
    """table: of the plain and of the FP8 ViT, where there are pictures and scales."""

    token_ids: list[int]
    table: torch.Tensor | None
    fp8_table: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with the unquantised model's answer; inputs: of each layer, prompt and answer."""

    question: Question
    tokens: list[int]
    logits: torch.Tensor
    inputs: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a part in FP8 does: over all tokens of all answers."""

    part: str
    logits_error: float
    divergence: float
    num_tokens_changed: int
    num_answers_changed: int


def asked(model: WholeModel, question: Question, stop_id: int, most: int) -> Asked:
    prompt = model.embed(question.token_ids, question.table)
    tokens = model.greedy(prompt, stop_id, most)
    inputs: list[torch.Tensor] = []
    whole = torch.cat((prompt, model.embed(tokens[:-1], None))) if tokens[:-1] else prompt
    hidden = model.run(whole, SequenceAttention({}), inputs=inputs)
    return Asked(question, tokens, model.logits(hidden[-len(tokens) :]), inputs)


def measure(model: WholeModel, part: Part, answers: list[Asked]) -> Sensitivity:
    squares = torch.zeros(2, dtype=torch.float64)
    divergence, num_tokens, changed_tokens, changed_answers = 0.0, 0, 0, 0
    with model.quantised(part) as caches:
        for answer in answers:
            found = model.logits(_hidden(model, part, answer, caches))
            difference = (found - answer.logits).to(torch.float64)
            squares += torch.stack(
                [difference.square().sum(), answer.logits.double().square().sum()]
            ).cpu()
            log_p, log_q = (x.double().log_softmax(-1) for x in (answer.logits, found))
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
            is_other = (found.argmax(-1) != answer.logits.argmax(-1)).sum()
            num_tokens += len(answer.tokens)
            changed_tokens += int(is_other)
            changed_answers += int(is_other > 0)
    error = float((squares[0] / squares[1]).sqrt())
    return Sensitivity(part.name, error, divergence / num_tokens, changed_tokens, changed_answers)


def _hidden(model: WholeModel, part: Part, answer: Asked, caches: dict[int, float]) -> torch.Tensor:
    """Behind the last layer, of the tokens that the answer's were drawn from."""
    first = part.first_layer
    start = answer.inputs[first]
    if part.has_vision and answer.question.fp8_table is not None:
        first = 0
        prompt = model.embed(answer.question.token_ids, answer.question.fp8_table)
        start = torch.cat((prompt, answer.inputs[0][len(prompt) :]))
    hidden = model.run(start, SequenceAttention(caches), first_layer=first)
    return hidden[-len(answer.tokens) :]


def load_questions(
    vision: VisionCheckpoint,
    model: NVLMConfig,
    tokenizer: Tokenizer,
    report: QuantizationReport,
    path: Path,
    count: int,
    device: torch.device,
) -> list[Question]:
    samples = load_calibration_set(path, count, model, tokenizer).samples
    plain = vision.load(vision.dtype, device)
    tables = [_encode(plain, sample.load_tiles(), device) for sample in samples]
    rows = [row for row in report.linears if row.linear.startswith("vision_model.")]
    fp8_tables: list[torch.Tensor | None] = [None] * len(samples)
    if rows:
        for row in rows:
            linear = plain.get_submodule(row.linear)
            assert isinstance(linear, nn.Linear | QuantizableLinear)
            quantised = QuantizableLinear.quantised(linear, VISION_FORMAT, row.scales)
            plain.set_submodule(row.linear, quantised)
        fp8_tables = [_encode(plain, sample.load_tiles(), device) for sample in samples]
    return [
        Question(sample.prompt.token_ids, table, fp8_table)
        for sample, table, fp8_table in zip(samples, tables, fp8_tables, strict=True)
    ]


def _encode(
    model: VisionModel, tiles: NDArray[np.uint8], device: torch.device
) -> torch.Tensor | None:
    """The prompt table, [tokens of all tiles, hidden_size]."""
    if not len(tiles):
        return None
    dtype = model.vision_model.embeddings.class_embedding.dtype
    parts = [
        model(normalize(tiles[start : start + _TILES_AT_A_TIME]).to(device, dtype))
        for start in range(0, len(tiles), _TILES_AT_A_TIME)
    ]
    return torch.cat(parts).flatten(0, 1)


def parser() -> ArgumentParser:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0], "python -m tools.sensitivity")
    add = parser.add_argument
    add("--checkpoint_dir", type=Path, required=True, help="a conversion with --quant_algo none")
    add("--report", type=Path, required=True, help=f"{layout.REPORT} of an FP8 conversion")
    add(
        "--questions",
        type=Path,
        default=BUILT_IN,
        help="JSONL as for --calib_data (default: built in)",
    )
    add("--num_questions", type=positive_int, default=16, help="questions to ask, at most")
    add("--max_new_tokens", type=positive_int, default=64, help="longest answer, in tokens")
    add("--by", choices=GROUPINGS, default="linear", help="part that is in FP8 at a time")
    add("--output", type=Path, help="file for the table as JSON (default: none)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    device = resolve_device(arguments.device)
    folder = arguments.checkpoint_dir
    read_manifest(folder, "checkpoint")
    config = CheckpointConfig.read(folder / layout.CONFIG)
    if config.weight_format is not UNQUANTIZED or config.world_size > 1:
        raise UserError(
            f"{folder} has --quant_algo {config.quant_algo} on {config.world_size} ranks, expected "
            "none on one; convert with --quant_algo none"
        )
    report = QuantizationReport.read(arguments.report, "--report")
    vision = VisionCheckpoint.read(folder / layout.VISION)
    tokenizer = Tokenizer(folder / layout.TOKENIZER)
    shape = NVLMConfig(vision.config, config.decoder, vision.tiling)
    with torch.inference_mode():
        count, path = arguments.num_questions, arguments.questions
        questions = load_questions(vision, shape, tokenizer, report, path, count, device)
        model = WholeModel(folder, config, report, device)
        stop_id = tokenizer.special_id(IM_END)
        answers = [asked(model, q, stop_id, arguments.max_new_tokens) for q in questions]
        has_vision = any(question.fp8_table is not None for question in questions)
        found = []
        for part in parts(config.decoder.num_hidden_layers, arguments.by, has_vision):
            found.append(measure(model, part, answers))
            log.info("%s: %.2f %% of the logits", part.name, 100 * found[-1].logits_error)
    found.sort(key=lambda row: -row.divergence)
    num_tokens = sum(len(answer.tokens) for answer in answers)
    print("\n".join(table(found, len(answers), num_tokens)))
    if arguments.output is not None:
        counts = {"num_questions": len(answers), "num_tokens": num_tokens}
        values = {**counts, "parts": [asdict(row) for row in found]}
        write_json_beside(arguments.output, values, "--output")


def table(rows: list[Sensitivity], num_answers: int, num_tokens: int) -> list[str]:
    """Markdown, in the order given."""
    lines = [
        f"{num_answers} answers of {num_tokens} tokens.",
        "",
        "| in FP8 | logits | divergence, nats | tokens changed | answers changed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        counts = f"{row.num_tokens_changed} | {row.num_answers_changed}"
        lines.append(f"| {row.part} | {row.logits_error:.2%} | {row.divergence:.2e} | {counts} |")
    return lines


if __name__ == "__main__":
    run(main)
