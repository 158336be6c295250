"""Decode steps of batches whose rows ask for more than the likeliest token, beside plain ones.

    plain     greedy, without any setting
    drawn     at temperature 1
    settings  drawn, in five kinds of rows: repetition penalty; presence and frequency penalty; the
              log probabilities of the token and of the likeliest five; min_p; all of them
    guided    greedy, all rows held to a JSON schema

They take turns on one executor, so that what changes meanwhile is in all of them. Their prompts are
the same, whose blocks are found again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

from bench.ceilings import Ceilings
from bench.hopper.decoder import Executors, decode_row, random_prompt
from bench.rows import Row
from bench.synthetic_vocabulary import SyntheticVocabulary
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.guidance import CompiledGuide, Guidance
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.requests.guide import Guide
from runtime.requests.sampling import SamplingParams

VARIANTS = ("plain", "drawn", "settings", "guided")
_WARM_UP = 4
_SCHEMA = {
    "type": "array",
    "minItems": 40,  # no answer ends while it is measured
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 20},
            "number": {"type": "integer", "minimum": 0, "maximum": 9999},
            "kind": {"enum": ["cat", "dog", "bird"]},
            "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        },
        "required": ["name", "number", "kind", "box"],
        "additionalProperties": False,
    },
}
_KINDS: tuple[dict[str, float | int | bool], ...] = (
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"logprobs": True, "top_logprobs": 5},
    {"min_p": 0.05},
)


def measure_settings(
    executors: Executors,
    batch_size: int,
    context: int,
    ceilings: Ceilings,
    num_rounds: int = 5,
    steps_a_round: int = 20,
) -> Iterator[Row]:
    """Steps in which `batch_size` requests decode at `context` tokens, for each of `VARIANTS`."""
    vocab_size = next(iter(executors.values()))[1].decoder.vocab_size
    vocabulary = SyntheticVocabulary(vocab_size)
    guide = Guide.of("json_schema", _SCHEMA)
    assert guide is not None
    # Guidance asks a tokenizer for nothing that this vocabulary has not.
    compiled = Guidance(vocabulary, vocab_size).compile(guide)  # type: ignore[arg-type]
    prompts = [random_prompt(vocab_size, context, seed) for seed in range(batch_size)]
    end = frozenset({vocabulary.special_id("<|im_end|>")})
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(num_rounds):
        for num_layers, (executor, _) in executors.items():
            for variant in VARIANTS:
                requests = [
                    _request(prompt, row, variant, end, guide, compiled)
                    for row, prompt in enumerate(prompts)
                ]
                found = _step_times(executor, requests, steps_a_round)
                times.setdefault((num_layers, variant), []).extend(found)
    for num_layers, (_, config) in executors.items():
        medians = {each: statistics.median(times[num_layers, each]) for each in VARIANTS}
        for variant, seconds in medians.items():
            phase = f"decode, {variant}"
            yield decode_row(config, batch_size, context, seconds, ceilings, phase)
        print(
            f"{num_layers} layers, batch {batch_size}: "
            f"guided {medians['guided'] / medians['plain']:.3f} times plain, settings "
            f"{1e3 * (medians['settings'] - medians['drawn']):+.3f} ms beside drawn",
            flush=True,
        )


def _request(
    prompt: list[int],
    row: int,
    variant: str,
    end: frozenset[int],
    guide: Guide,
    compiled: CompiledGuide,
) -> DecoderRequest:
    request = DecoderRequest(prompt, 400)
    if variant == "plain":
        return request
    if variant == "guided":
        return replace(request, stop_ids=end, guide=guide, compiled_guide=compiled)
    kinds = (*_KINDS, {name: value for kind in _KINDS for name, value in kind.items()})
    settings = kinds[row % len(kinds)] if variant == "settings" else {}
    params = SamplingParams(temperature=1.0, seed=row)
    return replace(request, sampling=replace(params, **settings))  # type: ignore[arg-type]


def _step_times(
    executor: TorchDecoderExecutor, requests: list[DecoderRequest], num_steps: int
) -> list[float]:
    """Seconds of steps in which all of them decode; they are cancelled then."""
    ids = [executor.submit(request) for request in requests]
    while len(executor.step()) < len(requests):  # what of the prompts is computed
        pass
    times = []
    for step in range(_WARM_UP + num_steps):
        start = time.perf_counter()
        outputs = executor.step()
        if step >= _WARM_UP:
            times.append(time.perf_counter() - start)
        assert len(outputs) == len(requests), "an answer ended"
    for request_id in ids:
        executor.cancel(request_id)
    return times
