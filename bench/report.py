"""What a run of phases measured: its rows as they come, what a layer adds, and JSON of it all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.ceilings import Ceilings
from bench.rows import FirstPictures, Interactive, Row
from nvlm.program.errors import UserError
from nvlm.program.json_files import write_json_atomically

Measured = Row | FirstPictures | Interactive
Key = tuple[str, int, int, int]
"""Phase, number of layers, batch size, number of tokens."""


class Report:
    """Prints each row, and keeps all in the file `output` from the first row on.

    one: milliseconds of one GPU, beside which rows bear their speed-up; None leaves it out.
    """

    def __init__(
        self,
        machine: dict[str, Any],
        ceilings: Ceilings,
        *,
        output: Path | None = None,
        one: dict[Key, float] | None = None,
    ) -> None:
        self._head = {"machine": machine, "ceilings": ceilings.to_json()}
        self._output, self._one = output, one
        self._measured: list[Measured] = []
        self._rows: list[dict[str, Any]] = []
        print(ceilings, flush=True)

    def show(self, measured: Iterable[Measured]) -> None:
        """The rows, printed as they come, then what a layer adds."""
        rows = []
        for row in measured:
            values = row.to_json()
            text = str(row)
            if self._one is not None:
                values["speed_up"] = speed_up = _speed_up(row, self._one)
                text += "" if speed_up is None else f" {speed_up:.2f} times one"
            print(text, flush=True)
            rows.append(row)
            self._measured.append(row)
            self._rows.append(values)
            if self._output is not None:
                write_json_atomically(self._output, self.to_json())
        for slope in slopes(rows):
            print(
                f"{slope['phase']:<8}batch {slope['batch_size']:<3} {slope['num_tokens']:>5} "
                f"tokens {slope['ms_per_layer']:.4f} ms per layer, {slope['fixed_ms']:.3f} ms fixed"
            )

    def to_json(self) -> dict[str, Any]:
        return self._head | {"rows": self._rows, "slopes": slopes(self._measured)}


def step_times(path: Path | str) -> dict[Key, float]:
    """Milliseconds of the rows of an earlier run: the file it kept, or its log, whose last line is
    JSON. Raises `UserError` for anything else."""
    try:
        text = Path(path).read_text()
        values = json.loads(text if text.startswith("{") else text.splitlines()[-1])
        return {_key(row): row["ms"] for row in values["rows"] if "ms" in row}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{path} holds no rows; expected the --output of bench.hopper, or its log"
        ) from None


def _speed_up(row: Measured, one: dict[Key, float]) -> float | None:
    values = row.to_json()
    key = _key(values)
    return one[key] / values["ms"] if key in one else None


def _key(row: dict[str, Any]) -> Key:
    return row["phase"], row["num_layers"], row["batch_size"], row["num_tokens"]


def slopes(measured: list[Measured]) -> list[dict[str, Any]]:
    """Milliseconds per layer between the smallest and the largest number of layers."""
    found, rows = [], [row for row in measured if isinstance(row, Row)]
    for key in dict.fromkeys((row.phase, row.batch_size, row.num_tokens) for row in rows):
        same = [row for row in rows if (row.phase, row.batch_size, row.num_tokens) == key]
        low, high = same[0], same[-1]
        if high.num_layers > low.num_layers:
            slope = (high.ms - low.ms) / (high.num_layers - low.num_layers)
            names = ("phase", "batch_size", "num_tokens")
            fixed = low.ms - slope * low.num_layers
            found.append(
                {**dict(zip(names, key, strict=True)), "ms_per_layer": slope, "fixed_ms": fixed}
            )
    return found
