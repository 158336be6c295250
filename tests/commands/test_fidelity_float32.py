"""The whole path in float32 against Hugging Face's Qwen2 on a float64 InternViT."""

from __future__ import annotations

import pytest

from tests.conftest import FP32, Workshop
from tests.reference import qwen2_hugging_face
from tests.support.cases import CASES, Case, ours, reference
from tests.support.tolerances import FLOAT32_LOGITS, relative_error

NUM_STEPS = 64


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_64_greedy_tokens_and_their_logits_equal_hugging_face(
    case: Case, workshop: Workshop
) -> None:
    model_dir = workshop.model(f"model-{case.name}", case.shape, seed=case.seed)
    checkpoint = workshop.checkpoint(f"float32-{case.name}", model_dir, FP32)
    vision = "onnxruntime" if case.seed == 100 else "torch"
    engine = workshop.engine(f"engine-{case.name}", checkpoint, vision=vision, max_num_images=3)

    answer = ours(engine, case, NUM_STEPS)
    expected = reference(model_dir, case)
    tokens, logits = qwen2_hugging_face.greedy(expected.model, expected.inputs_embeds, NUM_STEPS)

    vocab_size = case.shape.vocab_size
    prompt = [i if i < vocab_size else None for i in answer.request.token_ids]
    assert prompt == expected.token_ids
    assert answer.token_ids == tokens
    for step, (found, wanted) in enumerate(zip(answer.logits, logits, strict=True)):
        error = relative_error(found, wanted)
        assert error <= FLOAT32_LOGITS, f"step {step}: {error}"
    assert len(set(tokens)) > 8, "a stuck model proves little"
