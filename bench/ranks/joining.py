"""Random batches: requests join and leave between the decoder's steps, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from runtime.requests.sampling import SamplingParams
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.loop import BusyError, Loop
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket

_SAMPLED = 0.25  # of the requests
_LEAVING = 0.25
_MAX_GAP = 3  # steps between two that join


@dataclass(eq=False, slots=True)
class Guest:
    """A request that joins `gap` steps after the one before, or when nothing else is open.
    leaves_after: that many pieces of its answer; 0 stays."""

    request: GenerationRequest
    gap: int
    leaves_after: int
    pieces: list[str] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def heard(self) -> tuple[str, list[int]] | None:
        """What it was answered, or heard before it left; None while it waits for more."""
        if self.answer is not None:
            if self.answer.error is not None:
                raise self.answer.error
            assert self.answer.result is not None, "the last piece has a result or an error"
            return self.answer.result.text, self.answer.result.token_ids
        if self.leaves_after and len(self.pieces) >= self.leaves_after:
            return "".join(self.pieces[: self.leaves_after]), []
        return None


def guests(requests: list[GenerationRequest], number: int, max_new_tokens: int) -> list[Guest]:
    """`number` of `requests` in a random order, some sampled, some leaving; always the same."""
    rng = random.Random(0)
    found = []
    for seed in range(number):
        sampling = SamplingParams()
        if rng.random() < _SAMPLED:
            sampling = SamplingParams(temperature=0.9, top_k=50, seed=seed)
        request = replace(
            rng.choice(requests),
            max_new_tokens=rng.randint(1, max_new_tokens),
            sampling=sampling,
        )
        leaves_after = rng.randint(1, 4) if rng.random() < _LEAVING else 0
        found.append(Guest(request, rng.randint(0, _MAX_GAP), leaves_after))
    return found


def serve(
    runner: Runner, everyone: list[Guest], num_steps: int, after_step: Callable[[], object]
) -> None:
    """Takes `num_steps` steps, in which guests join as the batch has places. Whoever is still
    there then is left unanswered."""
    arriving = iter(everyone)
    guest = next(arriving)
    waited = 0
    with Loop(runner, max_open=runner.engine.limits.max_batch_size) as loop:
        for _ in range(num_steps):
            while not loop.is_full and (waited >= guest.gap or not loop.num_open):
                _join(loop, guest)
                guest, waited = next(arriving), 0
            loop.turn()
            waited += 1
            after_step()


def _join(loop: Loop, guest: Guest) -> None:
    ticket: Ticket | None = None

    def hear(answer: Answer) -> None:
        if isinstance(answer.error, BusyError):
            return  # the loop has ended
        guest.pieces.append(answer.text)
        if answer.is_last:
            guest.answer = answer
        elif len(guest.pieces) == guest.leaves_after and ticket is not None:
            loop.cancel(ticket)

    ticket = loop.submit(guest.request, hear)
