"""The scheduler as an object of its own: token counts in, who runs and on which blocks out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from nvlm.limits import EngineLimits
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.scheduler import (
    TOKENS_PER_BLOCK,
    BlockAllocator,
    Scheduler,
    Sequence,
    num_blocks_for,
)

LIMITS = EngineLimits(
    max_batch_size=4,
    max_input_len=200,
    max_seq_len=320,
    max_num_tokens=256,
    max_num_images=1,
    max_multimodal_len=0,
)
NUM_BLOCKS = 20


def sequence(request_id: int, num_prompt_tokens: int = 8, max_new_tokens: int = 8) -> Sequence:
    token_ids = [0] * num_prompt_tokens
    request = DecoderRequest(token_ids, max_new_tokens)
    return Sequence(request_id, request, num_prompt_tokens + max_new_tokens, list(token_ids))


def scheduler(num_blocks: int = NUM_BLOCKS, **limits: int) -> Scheduler:
    return Scheduler(replace(LIMITS, **limits), num_blocks)


def ids(sequences: list[Sequence]) -> list[int]:
    return [sequence.request_id for sequence in sequences]


def decode(running: list[Sequence]) -> None:
    """What an executor does in a step: everything pending is cached, one token is new."""
    for item in running:
        item.num_cached = len(item.token_ids)
        item.token_ids.append(0)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"),
    [
        (1, 1),
        (TOKENS_PER_BLOCK, 1),
        (TOKENS_PER_BLOCK + 1, 2),
        (3 * TOKENS_PER_BLOCK, 3),
        (3 * TOKENS_PER_BLOCK + 1, 4),
    ],
)
def test_a_block_holds_thirty_two_positions(num_tokens: int, num_blocks: int) -> None:
    assert TOKENS_PER_BLOCK == 32
    assert num_blocks_for(num_tokens) == num_blocks


def test_allocator_hands_out_every_block_once_and_takes_them_back() -> None:
    allocator = BlockAllocator(5)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    allocator.release(first)
    assert sorted(allocator.allocate(2)) == sorted(first)


@pytest.mark.parametrize(
    "misuse",
    [lambda a, held: a.allocate(2), lambda a, held: (a.release(held), a.release(held))],
    ids=["more than are free", "released twice"],
)
def test_allocator_asserts_on_misuse(misuse: Callable[[BlockAllocator, list[int]], object]) -> None:
    allocator = BlockAllocator(4)
    held = allocator.allocate(3)
    with pytest.raises(AssertionError):
        misuse(allocator, held)


def test_requests_join_in_order_of_arrival() -> None:
    tested = scheduler(max_batch_size=2)
    items = [sequence(i) for i in (7, 3, 9, 1)]
    for item in items:
        tested.add(item)
    assert ids(tested.schedule()) == [7, 3]
    tested.finish(items[0])
    assert ids(tested.schedule()) == [3, 9]
    tested.finish(items[1])
    assert ids(tested.schedule()) == [9, 1]


def test_a_step_never_runs_more_than_max_batch_size() -> None:
    tested = scheduler(max_batch_size=3)
    for i in range(5):
        tested.add(sequence(i))
    assert ids(tested.schedule()) == [0, 1, 2]
    assert (tested.num_running, tested.num_waiting) == (3, 2)


@pytest.mark.parametrize(("second", "joins"), [(156, True), (157, False)])
def test_prompts_that_join_together_fit_max_num_tokens(second: int, joins: bool) -> None:
    tested = scheduler(max_num_tokens=256)
    tested.add(sequence(0, num_prompt_tokens=100))
    tested.add(sequence(1, num_prompt_tokens=second))
    assert ids(tested.schedule()) == ([0, 1] if joins else [0])


@pytest.mark.parametrize(("second", "joins"), [(199, True), (200, False)])
def test_a_decoding_request_counts_one_token_of_max_num_tokens(second: int, joins: bool) -> None:
    tested = scheduler(max_num_tokens=200)
    tested.add(sequence(0, num_prompt_tokens=150))
    decode(tested.schedule())
    tested.add(sequence(1, num_prompt_tokens=second))
    assert ids(tested.schedule()) == ([0, 1] if joins else [0])


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_new_tokens", "num_blocks"),
    [(8, 24, 1), (8, 25, 2), (64, 1, 3), (200, 120, 10)],
)
def test_blocks_for_the_longest_answer_are_reserved_on_joining(
    num_prompt_tokens: int, max_new_tokens: int, num_blocks: int
) -> None:
    tested = scheduler()
    item = sequence(0, num_prompt_tokens, max_new_tokens)
    tested.add(item)
    assert tested.num_free_blocks == NUM_BLOCKS, "waiting takes no block"
    tested.schedule()
    assert len(item.blocks) == num_blocks
    assert tested.num_free_blocks == NUM_BLOCKS - num_blocks


def test_a_request_waits_until_blocks_for_its_longest_answer_are_free() -> None:
    tested = scheduler(num_blocks=4)
    first, second = (sequence(i, 32, 64) for i in (0, 1))  # 3 blocks each, its prompt needs one
    tested.add(first)
    tested.add(second)
    assert ids(tested.schedule()) == [0]
    assert second.blocks == []
    tested.finish(first)
    assert ids(tested.schedule()) == [1]


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    tested = scheduler(num_blocks=4)
    first = sequence(0, 32, 32)  # 2 of 4 blocks
    for item in (first, sequence(1, 64, 64), sequence(2, 8, 8)):  # 4 blocks, 1 block
        tested.add(item)
    assert ids(tested.schedule()) == [0]
    tested.finish(first)
    assert ids(tested.schedule()) == [1]


@pytest.mark.parametrize("leave", ["finish", "cancel"])
def test_a_running_request_that_leaves_gives_back_its_blocks(leave: str) -> None:
    tested = scheduler()
    gone, kept = sequence(0, 64, 64), sequence(1, 64, 64)
    tested.add(gone)
    tested.add(kept)
    tested.schedule()
    held = list(kept.blocks)
    if leave == "finish":
        tested.finish(gone)
    else:
        tested.cancel(gone.request_id)
    assert tested.num_free_blocks == NUM_BLOCKS - 4
    assert ids(tested.schedule()) == [1]
    assert kept.blocks == held


def test_a_waiting_request_that_is_cancelled_never_runs_and_frees_nothing() -> None:
    tested = scheduler(max_batch_size=1)
    items = [sequence(i) for i in range(3)]
    for item in items:
        tested.add(item)
    tested.schedule()
    free = tested.num_free_blocks
    tested.cancel(1)
    assert (tested.num_free_blocks, tested.num_waiting) == (free, 1)
    tested.finish(items[0])
    assert ids(tested.schedule()) == [2]


def test_cancelling_an_unknown_id_changes_nothing() -> None:
    tested = scheduler(max_batch_size=1)
    tested.add(sequence(0))
    tested.add(sequence(1))
    tested.schedule()
    before = (tested.num_running, tested.num_waiting, tested.num_free_blocks)
    tested.cancel(99)
    assert (tested.num_running, tested.num_waiting, tested.num_free_blocks) == before


def test_a_request_larger_than_the_whole_cache_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        scheduler(num_blocks=2).add(sequence(0, 64, 1))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_conserved_and_never_shared_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    tested = scheduler(max_batch_size=rng.randint(1, 6))
    alive: dict[int, Sequence] = {}
    joined: list[int] = []
    cancelled: set[int] = set()
    next_id = 0
    for _ in range(300):
        action = rng.random()
        if action < 0.35:
            item = sequence(next_id, rng.randint(1, 200), rng.randint(1, 120))
            alive[next_id] = item
            tested.add(item)
            next_id += 1
        elif action < 0.5 and alive:
            request_id = rng.choice(list(alive))
            cancelled.add(request_id)
            del alive[request_id]
            tested.cancel(request_id)
        else:
            running = tested.schedule()
            assert sum(len(item.pending) for item in running) <= LIMITS.max_num_tokens
            assert running or not alive, "something waits though nothing runs"
            joined += [i for i in ids(running) if i not in joined]
            decode(running)
            for item in running:
                if len(item.token_ids) == item.max_num_tokens or rng.random() < 0.2:
                    tested.finish(item)
                    del alive[item.request_id]
        held = [block for item in alive.values() for block in item.blocks]
        assert len(held) == len(set(held)), "two requests share a block"
        assert set(held) <= set(range(NUM_BLOCKS))
        assert tested.num_free_blocks + len(held) == NUM_BLOCKS
        assert tested.num_running + tested.num_waiting == len(alive)
    assert joined == sorted(joined), "somebody overtook"
    for request_id in list(alive):
        tested.cancel(request_id)
    assert tested.num_free_blocks == NUM_BLOCKS
    assert len(joined) > 10
    assert cancelled


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    tested = scheduler(max_batch_size=4, num_blocks=10)
    large = sequence(1000, 200, 120)  # the whole cache, and nearly all tokens of a step
    for step in range(60):
        tested.add(sequence(step, 8, 4))
        if step == 10:
            tested.add(large)
        running = tested.schedule()
        if large in running:
            break
        decode(running)
        for item in running:
            if len(item.token_ids) == item.max_num_tokens:
                tested.finish(item)
    else:
        pytest.fail("the large request never ran")
    assert step <= 10 + 4, "it waits only for those that ran when it came"
