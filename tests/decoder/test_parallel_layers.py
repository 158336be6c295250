"""What each rank computes of a layer, from its own file: column parallel parts are the columns that
one rank computes, bit by bit; row parallel parts add up to its sums."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.config import exact_div
from runtime.decoder.models.torch_weights import DecoderWeights, load_weights, open_weights
from runtime.engine.engine_dir import EngineDir
from tests.conftest import FP8, FP32, Workshop
from tests.support.ranks import engine_of
from tests.support.tolerances import BF16_ROW_PARALLEL, FLOAT32_ROW_PARALLEL, relative_error

CPU = torch.device("cpu")
NUM_TOKENS = 24


class Loaded(NamedTuple):
    config: CheckpointConfig
    one: DecoderWeights
    ranks: list[DecoderWeights]


@pytest.fixture(
    scope="module",
    params=[(FP32, 2), (FP32, 4), (FP32, 8), (FP8, 2), (replace(FP8, quantize_lm_head=True), 2)],
    ids=["float32 tp2", "float32 tp4", "float32 tp8", "FP8 tp2", "FP8 head tp2"],
)
def loaded(workshop: Workshop, request: pytest.FixtureRequest) -> Loaded:
    options, tp_size = request.param

    def weights(size: int) -> list[DecoderWeights]:
        engine = EngineDir.read(engine_of(workshop, size, options))
        config, folder = engine.checkpoint_config, engine.directory / "llm"
        reduce = None if size == 1 else torch.clone
        return [
            load_weights(open_weights(folder, config, rank), config, CPU, reduce)
            for rank in range(size)
        ]

    config = EngineDir.read(engine_of(workshop, 1, options)).checkpoint_config
    return Loaded(config, weights(1)[0], weights(tp_size))


def rows(columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_TOKENS, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("name", ["mlp.fc", "mlp.gate"])
def test_column_parallel_outputs_are_those_of_one_rank_bit_by_bit(
    loaded: Loaded, name: str
) -> None:
    for layer, one in enumerate(loaded.one.layers):
        x = rows(loaded.config.decoder.hidden_size, loaded.one.embedding.dtype, layer)
        parts = [weights.layers[layer].linear(name)(x) for weights in loaded.ranks]
        assert torch.equal(torch.cat(parts, dim=1), one.linear(name)(x))


def test_queries_keys_and_values_are_those_of_one_rank_bit_by_bit(loaded: Loaded) -> None:
    """A rank holds its heads' rows of all three, one after the other; eight ranks share the four
    key and value heads in pairs."""
    head_dim = loaded.config.decoder.head_dim
    for layer, one in enumerate(loaded.one.layers):
        x = rows(loaded.config.decoder.hidden_size, loaded.one.embedding.dtype, layer)
        sizes = (one.query_size, one.key_value_size, one.key_value_size)
        expected = one.linear("attention.qkv")(x).split(sizes, dim=1)
        parts = []
        for weights in loaded.ranks:
            own = weights.layers[layer]
            sizes = (own.query_size, own.key_value_size, own.key_value_size)
            parts.append(own.linear("attention.qkv")(x).split(sizes, dim=1))
        for kind in range(3):
            found = torch.cat([part[kind] for part in parts], dim=1)
            heads = expected[kind].unflatten(1, (-1, head_dim))
            copies = exact_div(found.shape[1], expected[kind].shape[1])
            assert torch.equal(found, heads.repeat_interleave(copies, dim=1).flatten(1))


def test_logits_are_those_of_one_rank_bit_by_bit(loaded: Loaded) -> None:
    x = rows(loaded.config.decoder.hidden_size, loaded.one.embedding.dtype)
    parts = [weights.lm_head(x) for weights in loaded.ranks]
    assert torch.equal(torch.cat(parts, dim=1), loaded.one.lm_head(x))


@pytest.mark.parametrize("name", ["attention.dense", "mlp.proj"])
def test_row_parallel_parts_are_float32_and_add_up_to_the_sums_of_one_rank(
    loaded: Loaded, name: str
) -> None:
    dtype = loaded.one.embedding.dtype
    tolerance = FLOAT32_ROW_PARALLEL if dtype == torch.float32 else BF16_ROW_PARALLEL
    for layer, one in enumerate(loaded.one.layers):
        linear = one.linear(name)
        x = rows(linear.weight.shape[1], dtype, layer)
        parts = [
            weights.layers[layer].linear(name)(part)
            for weights, part in zip(loaded.ranks, x.chunk(len(loaded.ranks), dim=1), strict=True)
        ]
        assert all(part.dtype == torch.float32 for part in parts)
        found, expected = sum(parts).to(dtype), linear(x)
        assert relative_error(found, expected) <= tolerance
        # Not a copy: every rank's part matters.
        assert relative_error(parts[0].to(dtype), expected) > 0.1
