"""run.py of any checkout, with its batch timed.

    batch_driver.py <checkout> <step_ms> <flags of run.py>

A process of its own, for bench.cpu.batch. It knows of a checkout only that `run.run_batch` is
called with the runner first, and the decoder's `submit`, `step` and `cancel`. The last word on
stdout is the seconds that the batch took.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any


class FixedStepDecoder:
    """Answers every request with its max_new_tokens tokens, one in each step of `step_s`."""

    def __init__(self, own: Any, step_s: float) -> None:
        self._own, self._step_s = own, step_s
        # As the checkout's own executor knows it, wherever it is defined there.
        self._output = vars(sys.modules[type(own).__module__])["StepOutput"]
        self._num_left: dict[int, int] = {}
        self._next_id = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def submit(self, request: Any) -> int:
        self._next_id += 1
        self._num_left[self._next_id] = request.max_new_tokens
        return self._next_id

    def cancel(self, request_id: int) -> None:
        self._num_left.pop(request_id, None)

    def step(self) -> list[Any]:
        if not self._num_left:
            return []
        time.sleep(self._step_s)
        outputs = []
        for request_id in list(self._num_left):
            self._num_left[request_id] -= 1
            is_last = self._num_left[request_id] == 0
            outputs.append(self._output(request_id, 1, "length" if is_last else None))
            if is_last:
                del self._num_left[request_id]
        return outputs


def main() -> None:
    checkout, step_ms, *flags = sys.argv[1:]
    sys.path[0] = checkout
    sys.argv = ["run.py", *flags]
    run: Any = import_module("run")
    run_batch = run.run_batch

    def timed(runner: Any, *arguments: Any) -> Any:
        if float(step_ms):
            runner.decoder = FixedStepDecoder(runner.decoder, float(step_ms) / 1e3)
        started = time.perf_counter()
        result = run_batch(runner, *arguments)
        print(time.perf_counter() - started)
        return result

    run.run_batch = timed
    sys.exit(run.main())


if __name__ == "__main__":
    main()
