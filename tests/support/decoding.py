"""Steps a bare `DecoderExecutor` to the end of its requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from runtime.decoder.executor import DecoderExecutor, DecoderRequest, FinishReason, StepOutput
from runtime.serving.runner import Runner


def generate(
    executor: DecoderExecutor, requests: list[DecoderRequest]
) -> list[tuple[list[int], FinishReason]]:
    """(token_ids, finish_reason) of each request, in order."""
    tokens: dict[int, list[int]] = {executor.submit(request): [] for request in requests}
    reasons: dict[int, FinishReason] = {}
    for output in _steps(executor):
        if output.request_id not in tokens:
            continue
        if output.token_id is not None:
            tokens[output.request_id].append(output.token_id)
        if output.error is not None:
            raise output.error
        if output.finish_reason is not None:
            reasons[output.request_id] = output.finish_reason
    return [(ids, reasons[request_id]) for request_id, ids in tokens.items()]


def _steps(executor: DecoderExecutor) -> Iterator[StepOutput]:
    while outputs := executor.step():
        yield from outputs


def engine_logits(
    engine_dir: Path, prompt: list[int], tokens: list[int], device: str = "cpu"
) -> torch.Tensor:
    """[tokens, vocab_size]: those that each token of an answer would be drawn from."""
    rows = []
    with Runner.open(engine_dir, torch.device(device)) as runner:
        for count in range(len(tokens)):
            request = DecoderRequest(prompt + tokens[:count], 1, return_logits=True)
            runner.decoder.submit(request)
            (output,) = runner.decoder.step()
            assert output.logits is not None
            rows.append(output.logits)
    return torch.stack(rows)
