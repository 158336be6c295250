"""The scheduler as an object of its own: token counts in, who runs and on which blocks out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from nvlm.planning.limits import EngineLimits
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, BlockAllocator, num_blocks_for
from runtime.decoder.executor import DecoderRequest, WaitCause
from runtime.decoder.scheduler import Scheduler, Sequence

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
    token_ids = [1000 * request_id + i for i in range(num_prompt_tokens)]  # no shared prefix
    request = DecoderRequest(token_ids, max_new_tokens)
    return Sequence(request_id, request, num_prompt_tokens + max_new_tokens, list(token_ids))


def scheduler(num_blocks: int = NUM_BLOCKS, **limits: int) -> Scheduler:
    return Scheduler(replace(LIMITS, **limits), num_blocks)


def ids(sequences: list[Sequence]) -> list[int]:
    return [sequence.request_id for sequence in sequences]


def decode(tested: Scheduler, running: list[Sequence]) -> None:
    """What an executor does in a step: what is scheduled is cached, and with the last chunk of its
    tokens a request gets a new one."""
    drawing = [item for item in running if item.is_last_chunk]
    tested.advance(running)
    for item in drawing:
        item.token_ids.append(item.request_id)


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


@pytest.mark.parametrize(("second", "chunk"), [(199, 199), (200, 199)])
def test_a_decoding_request_counts_one_token_of_max_num_tokens(second: int, chunk: int) -> None:
    tested = scheduler(max_num_tokens=200)
    tested.add(sequence(0, num_prompt_tokens=150))
    decode(tested, tested.schedule())
    tested.add(sequence(1, num_prompt_tokens=second))
    assert [len(item.pending) for item in tested.schedule()] == [1, chunk]


@pytest.mark.parametrize(("second", "chunk"), [(156, 156), (157, 156), (200, 156)])
def test_a_prompt_that_does_not_fit_max_num_tokens_is_computed_in_chunks(
    second: int, chunk: int
) -> None:
    tested = scheduler(max_num_tokens=256)
    items = [sequence(0, num_prompt_tokens=100), sequence(1, num_prompt_tokens=second)]
    for item in items:
        tested.add(item)
    running = tested.schedule()
    assert [len(item.pending) for item in running] == [100, chunk]
    assert [item.is_last_chunk for item in running] == [True, chunk == second]
    decode(tested, running)
    rest = second - chunk
    assert [item.pending for item in tested.schedule()] == [
        [0],
        items[1].request.token_ids[chunk:] if rest else [1],
    ]


def test_requests_that_decode_come_before_chunks_of_an_older_prompt() -> None:
    tested = scheduler(max_num_tokens=64)
    long, short = sequence(0, 150), sequence(1, 4)
    tested.add(long)
    decode(tested, tested.schedule())  # 64 of 150
    tested.add(short)
    decode(tested, tested.schedule())  # 128 of 150, none left for another
    decode(tested, tested.schedule())  # the last 22, and the short one joins
    assert (long.num_generated, short.num_generated) == (1, 1)
    later = sequence(2, 200)
    tested.add(later)
    running = tested.schedule()
    assert [len(item.pending) for item in running] == [1, 1, 62]
    assert ids(running) == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_blocks"), [(8, 1), (32, 1), (33, 2), (64, 2), (200, 7)]
)
def test_joining_takes_the_blocks_of_the_prompt(num_prompt_tokens: int, num_blocks: int) -> None:
    tested = scheduler()
    item = sequence(0, num_prompt_tokens, 120)
    tested.add(item)
    assert tested.num_free_blocks == NUM_BLOCKS, "waiting takes no block"
    tested.schedule()
    assert len(item.blocks) == num_blocks
    assert tested.num_free_blocks == NUM_BLOCKS - num_blocks


def test_a_request_waits_until_the_blocks_of_its_prompt_are_free() -> None:
    tested = scheduler(num_blocks=4)
    first, second = (sequence(i, 96, 16) for i in (0, 1))
    tested.add(first)
    tested.add(second)
    assert ids(tested.schedule()) == [0]
    assert second.blocks == []
    tested.finish(first)
    assert ids(tested.schedule()) == [1]


def test_without_a_free_block_the_last_to_come_gives_way_and_waits_in_front() -> None:
    tested = scheduler(num_blocks=4)
    items = [sequence(0, 32, 64), sequence(1, 32, 64), sequence(2, 64, 8)]
    for item in items:
        tested.add(item)
    decode(tested, tested.schedule())  # 0, 1 and 2 hold one, one and two blocks
    assert tested.num_free_blocks == 0
    running = tested.schedule()  # 0 and 1 need a second one each
    assert ids(running) == [0, 1]
    assert [len(item.blocks) for item in items] == [2, 2, 0]
    assert (tested.num_preemptions, tested.num_waiting) == (1, 1)
    assert (items[2].num_cached, items[2].num_generated) == (0, 1), "its token is not forgotten"
    tested.finish(items[0])
    tested.finish(items[1])
    tested.add(sequence(3))
    running = tested.schedule()
    assert ids(running) == [2, 3]
    assert running[0].num_cached + len(running[0].pending) == 65


def test_one_that_gives_way_to_an_older_one_is_not_run_in_that_step() -> None:
    tested = scheduler(num_blocks=4)
    items = [sequence(0, 64, 64), sequence(1, 60, 64)]
    for item in items:
        tested.add(item)
    for _ in range(5):
        decode(tested, tested.schedule())
    assert ids(tested.schedule()) == [0]
    assert items[1].blocks == []
    assert items[1].num_generated > 0


class TestPrefixReuse:
    def finished(self, tested: Scheduler, item: Sequence) -> None:
        tested.add(item)
        decode(tested, tested.schedule())
        tested.finish(item)

    def like(self, first: Sequence, num_tokens: int, request_id: int = 9) -> Sequence:
        """Another request whose first `num_tokens` tokens are the same."""
        new = sequence(request_id, 200)
        new.token_ids[:num_tokens] = first.token_ids[:num_tokens]
        return new

    @pytest.mark.parametrize(
        ("num_common", "num_shared"), [(200, 6), (192, 6), (191, 5), (64, 2), (31, 0), (0, 0)]
    )
    def test_full_blocks_of_a_known_prefix_are_shared(
        self, num_common: int, num_shared: int
    ) -> None:
        tested = scheduler()
        first = sequence(0, 200)
        self.finished(tested, first)
        second = self.like(first, num_common)
        tested.add(second)
        tested.schedule()
        assert second.num_cached == 32 * num_shared
        assert len(second.pending) == 200 - 32 * num_shared
        assert tested.num_reused_tokens == 32 * num_shared

    def test_the_last_token_is_always_computed(self) -> None:
        tested = scheduler()
        first = sequence(0, 64)
        self.finished(tested, first)
        second = sequence(0, 64)
        tested.add(second)
        assert len(tested.schedule()[0].pending) == 32

    def test_other_pictures_under_the_same_tokens_are_not_shared(self) -> None:
        tested = scheduler()
        key, other = b"8 bytes and more", b"8 bytes and else"
        picture = [b""] * 8 + [key] * 192
        for number, (image_keys, num_shared) in enumerate(
            [(picture, 0), (picture, 6), ([b""] * 8 + [other] * 192, 0), ([], 0), (picture, 6)]
        ):
            item = sequence(0, 200)
            item.image_keys = image_keys
            tested.add(item)
            tested.schedule()
            assert item.num_cached == 32 * num_shared, f"request {number}"
            decode(tested, tested.schedule())
            tested.finish(item)

    def test_two_running_requests_hold_the_same_blocks_until_both_end(self) -> None:
        tested = scheduler()
        first, second = sequence(0, 100), sequence(0, 100)
        second.request_id = 1
        tested.add(first)
        decode(tested, tested.schedule())
        tested.add(second)
        running = tested.schedule()
        assert second.blocks[:3] == first.blocks[:3]
        assert second.blocks[3] != first.blocks[3]
        decode(tested, running)
        tested.finish(first)
        assert tested.num_free_blocks == NUM_BLOCKS - 4
        tested.finish(second)
        assert tested.num_free_blocks == NUM_BLOCKS

    def test_kept_blocks_give_way_to_new_requests_oldest_first(self) -> None:
        tested = scheduler(num_blocks=14)
        old, young = sequence(0, 200), sequence(1, 200)
        self.finished(tested, old)
        self.finished(tested, young)
        self.finished(tested, sequence(2, 160))
        again = self.like(young, 200)
        tested.add(again)
        tested.schedule()
        assert again.num_cached == 192
        tested.cancel(again.request_id)
        lost = self.like(old, 200, request_id=8)
        tested.add(lost)
        tested.schedule()
        assert lost.num_cached < 192


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    tested = scheduler(num_blocks=4)
    first = sequence(0, 64, 8)  # 2 of 4 blocks
    for item in (first, sequence(1, 100, 28), sequence(2, 8, 8)):  # 4 blocks, 1 block
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
    assert tested.num_free_blocks == NUM_BLOCKS - 2
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
def test_blocks_are_conserved_and_shared_only_with_equal_contents(seed: int) -> None:
    rng = random.Random(seed)
    max_batch_size = rng.randint(1, 6)
    tested = scheduler(max_batch_size=max_batch_size)
    alive: dict[int, Sequence] = {}
    joined: list[int] = []
    cancelled: set[int] = set()
    next_id = 0
    for _ in range(600):
        action = rng.random()
        if action < 0.35:
            item = sequence(next_id, rng.randint(1, 200), rng.randint(1, 120))
            common = rng.choice([0, 0, 40, 100])
            item.token_ids[:common] = range(len(item.token_ids[:common]))
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
            decode(tested, running)
            for item in running:
                if len(item.token_ids) == item.max_num_tokens or rng.random() < 0.03:
                    tested.finish(item)
                    del alive[item.request_id]
        contents: dict[int, list[int]] = {}
        for item in alive.values():
            for i, block in enumerate(item.blocks):
                tokens = item.token_ids[: min((i + 1) * 32, item.num_cached)]
                assert contents.setdefault(block, tokens) == tokens, "one block, two contents"
        assert set(contents) <= set(range(NUM_BLOCKS))
        assert tested.num_free_blocks + len(contents) == NUM_BLOCKS
        assert tested.num_running + tested.num_waiting == len(alive)
    assert joined == sorted(joined), "somebody overtook"
    for request_id in list(alive):
        tested.cancel(request_id)
    assert tested.num_free_blocks == NUM_BLOCKS
    assert len(joined) > 10
    assert cancelled
    assert tested.num_reused_tokens > 0
    assert tested.num_preemptions > 0 or max_batch_size < 5, "the cache was never full"


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
        decode(tested, running)
        for item in running:
            if len(item.token_ids) == item.max_num_tokens:
                tested.finish(item)
    else:
        pytest.fail("the large request never ran")
    assert step <= 10 + 4, "it waits only for those that ran when it came"


def test_what_the_first_that_waits_needs_is_counted() -> None:
    def waiting(tested: Scheduler) -> dict[WaitCause, int]:
        tested.schedule()
        return tested.counts.waiting

    full = scheduler(max_batch_size=1)
    for i in range(3):
        full.add(sequence(i))
    assert waiting(full) == {"place": 2}
    for limited, cause in (
        (scheduler(num_blocks=2), "blocks"),
        (scheduler(max_num_tokens=50), "step"),
    ):
        limited.add(sequence(0, 50, 14))
        limited.add(sequence(1, 50, 14))
        assert waiting(limited) == {cause: 1}
    tested = scheduler(max_num_tokens=150)
    first, second = sequence(0, 200), sequence(0, 200)
    second.request_id, second.same_prompt = 1, first
    tested.add(first)
    tested.schedule()
    tested.advance([first])
    tested.add(second)
    assert waiting(tested) == {"equal_prompt": 1}
    tested.advance([first])
    assert waiting(tested) == {}


def test_prompt_tokens_beside_rows_that_decode_are_counted() -> None:
    tested = scheduler(max_num_tokens=64)
    tested.add(sequence(0, 100))
    decode(tested, tested.schedule())
    decode(tested, tested.schedule())
    assert (tested.counts.num_tokens_beside, tested.counts.num_tokens_alone) == (0, 100)
    tested.add(sequence(1, 70))
    decode(tested, tested.schedule())
    assert (tested.counts.num_tokens_beside, tested.counts.num_tokens_alone) == (63, 100)
