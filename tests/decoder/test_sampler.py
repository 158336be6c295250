"""Drawing a token: supports, frequencies and reproducibility on distributions made by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from nvlm.program.errors import UserError
from runtime.decoder.sampler import sample_rows
from runtime.requests.sampling import SamplingParams


def sample(logits: torch.Tensor, params: SamplingParams, step: int) -> int:
    """The token drawn from one row of logits [vocab_size] at the request's `step`."""
    return int(sample_rows(logits[None], [params], [step]))


SHUFFLED = [0.05, 0.4, 0.1, 0.3, 0.15]  # likeliest first: tokens 1, 3, 4, 2, 0
NUM_DRAWS = 2000


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().to(torch.float32)


def counts(logits: torch.Tensor, num_draws: int = NUM_DRAWS, **params: float) -> Counter[int]:
    """Draws over as many seeds, at step 0."""
    return Counter(
        sample(logits, SamplingParams(**{"temperature": 1.0, **params, "seed": seed}), 0)  # type: ignore[arg-type]
        for seed in range(num_draws)
    )


def assert_frequencies(found: Counter[int], expected: list[float]) -> None:
    """Pearson's chi-square, at most 5 standard deviations (sqrt(2 k)) above its mean k."""
    total = sum(found.values())
    assert set(found) <= {i for i, p in enumerate(expected) if p > 0}, f"impossible token: {found}"
    cells = [(found[i], total * p) for i, p in enumerate(expected) if p > 0]
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), f"{chi_square=:.1f} of {found}"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(seed=5, top_p=0.5, top_k=3),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
    ],
    ids=["temperature 0", "temperature 0 with filters", "top_k 1", "tiny top_p"],
)
def test_greedy_settings_take_the_likeliest_token(params: SamplingParams) -> None:
    assert {sample(logits_of(SHUFFLED), params, step) for step in range(50)} == {1}


def test_default_is_greedy() -> None:
    assert SamplingParams().is_greedy
    assert not SamplingParams(temperature=1.0).is_greedy


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=1.0, top_k=1)],
    ids=["temperature 0", "top_k 1"],
)
def test_greedy_takes_the_first_of_equal_tokens(params: SamplingParams) -> None:
    assert sample(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0]), params, 0) == 1


@pytest.mark.parametrize(
    ("params", "support"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 500}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_p": 0.94}, {1, 2, 3, 4}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        # Of the two likeliest, token 1 alone has 4/7 = 0.571: top_p counts what top_k left.
        ({"top_k": 2, "top_p": 0.57}, {1}),
        ({"top_k": 2, "top_p": 0.58}, {1, 3}),
    ],
)
def test_filters_keep_exactly_these_tokens(params: dict[str, float], support: set[int]) -> None:
    found = counts(logits_of(SHUFFLED), 400, **params)
    assert set(found) == support


@pytest.mark.parametrize(
    ("top_p", "support"),
    [(0.25, {0}), (0.250001, {0, 1}), (0.5, {0, 1}), (0.500001, {0, 1, 2}), (0.75, {0, 1, 2})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, support: set[int]) -> None:
    """Four equal tokens: their sums are exact, 1/4, 1/2, 3/4, 1; equal ones go by id."""
    assert set(counts(torch.zeros(4), 300, top_p=top_p)) == support


def test_top_k_keeps_the_first_of_equal_tokens() -> None:
    assert set(counts(torch.tensor([1.0, 3.0, 3.0, 3.0, 3.0]), 300, top_k=3)) == {1, 2, 3}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, SHUFFLED),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.8}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"temperature": 0.5}, [p * p / 0.285 for p in SHUFFLED]),  # sum of squares
    ],
    ids=["plain", "top_k", "top_p", "temperature"],
)
def test_frequencies_over_seeds_follow_the_distribution(
    params: dict[str, float], expected: list[float]
) -> None:
    assert_frequencies(counts(logits_of(SHUFFLED), **params), expected)


def test_frequencies_over_the_steps_of_one_request_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    logits = logits_of(SHUFFLED)
    assert_frequencies(Counter(sample(logits, params, s) for s in range(NUM_DRAWS)), SHUFFLED)


def test_draws_of_neighbouring_steps_are_independent() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    draws = [sample(torch.zeros(2), params, step) for step in range(NUM_DRAWS)]
    pairs = Counter(2 * a + b for a, b in zip(draws[::2], draws[1::2], strict=True))
    assert_frequencies(pairs, [0.25] * 4)


def test_draws_of_neighbouring_seeds_are_independent() -> None:
    draws = [
        sample(torch.zeros(2), SamplingParams(temperature=1.0, seed=seed), 0)
        for seed in range(NUM_DRAWS)
    ]
    pairs = Counter(2 * a + b for a, b in zip(draws[::2], draws[1::2], strict=True))
    assert_frequencies(pairs, [0.25] * 4)


def test_same_seed_and_step_give_the_same_token_and_others_differ() -> None:
    logits = torch.zeros(1000)

    def run(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        return [sample(logits, params, step) for step in range(20)]

    assert run(42) == run(42)
    assert run(42) != run(43)
    assert len(set(run(42))) > 10, "steps repeat one number"


def test_a_draw_leaves_no_trace_in_the_global_generators() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    sample(torch.zeros(10), SamplingParams(temperature=1.0), 0)
    assert torch.equal(torch.rand(1), expected)


def test_a_row_of_a_batch_is_drawn_as_if_it_were_alone_and_is_left_as_it_was() -> None:
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=9)
    for step in range(20):
        for row in rows:
            assert sample(row, params, step) == sample(row.clone(), params, step)
    assert torch.equal(rows, before)


def test_largest_seed_and_a_late_step_work() -> None:
    params = SamplingParams(temperature=1.0, seed=2**64 - 1)
    assert 0 <= sample(torch.zeros(8), params, 1_000_000) < 8


def test_highest_temperature_is_almost_uniform() -> None:
    # Logits of e^(+-1/100) around each other: probabilities 0.2475 to 0.2525.
    assert_frequencies(counts(torch.tensor([-1.0, 1.0, -1.0, 1.0]), temperature=100.0), [0.25] * 4)


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-40, 5e-324])
def test_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([-3.0, 20.0, 19.0, 0.0])
    params = SamplingParams(temperature=temperature)
    assert {sample(logits, params, step) for step in range(20)} == {1}


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([3e38, 3e38, -3e38])
    assert_frequencies(counts(logits, 500), [0.5, 0.5, 0.0])


def test_an_impossible_token_is_never_drawn_even_where_the_draw_rounds_up_to_one() -> None:
    """With these seeds the uniform number is 1 - 1e-8 or nearer: 1 in float32."""
    logits = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    for seed in (62959310, 150140530, 257373702, 307383681):
        assert sample(logits, SamplingParams(temperature=1.0, seed=seed), 0) in (0, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, 100.1, math.nan, math.inf)),
        ("top_k", -1),
        *(("top_p", value) for value in (0.0, -0.5, 1.01, math.nan)),
        *(("seed", value) for value in (-1, 2**64)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
