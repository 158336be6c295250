"""The comparison with vLLM, up to vLLM itself: folders, pictures, our answers, what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from bench.peers import read_exports
from bench.peers.read_exports import EXPORTS, ask_ours, compared, make, questions

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_exports_are_made_asked_and_compared(tmp_path: Path) -> None:
    make(tmp_path)
    for name in EXPORTS:
        config = AutoConfig.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert config.get_text_config().num_hidden_layers == 5
        assert config.quantization_config["kv_cache_scheme"]["num_bits"] == 8
    asked = questions(tmp_path, 1)
    assert len(asked) == len(read_exports.TASKS)
    ours = ask_ours(tmp_path / "engine", asked, torch.device("cpu"))
    same = compared(asked, ours, ours)
    assert same["num_equal"] == same["num_same_prompt_tokens"] == len(asked)
    assert same["num_right"]["ours"] >= len(asked) - 1
    other = [{"text": "no", "num_prompt_tokens": 1} for _ in ours]
    found = json.loads(json.dumps(compared(asked, ours, other)))
    assert (found["num_equal"], found["num_right"]["theirs"]) == (0, 0)
    assert len(found["different"]) == len(asked)
