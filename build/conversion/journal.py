"""What an unfinished conversion has done: one line a unit of work, in the staging directory.

A line is written when everything that its unit wrote is on the disk, so a run that was killed at
any moment resumes after the last whole line.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvlm.formats import layout

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Journal:
    """The lines that say which units are done."""

    path: Path  # the file that is appended to
    made_from: dict[str, Any]  # what the units depend on; a journal of anything else starts over
    # What the finished units recorded, in their order.
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_done(self) -> int:
        return len(self.records)

    @classmethod
    def open(cls, directory: Path, made_from: dict[str, Any]) -> Journal:
        """What an earlier run that was making the same has done, or nothing."""
        journal = cls(directory / layout.JOURNAL, _as_json(made_from))
        try:
            whole = journal.path.read_bytes().rpartition(b"\n")[0]
            lines = [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError):
            return journal
        if lines and lines[0] == journal.made_from:
            journal.records.extend(lines[1:])
        elif lines:
            log.info("%s is of other arguments, input or versions: starting over", directory)
        return journal

    def commit(self, record: dict[str, Any]) -> None:
        """Records a unit whose output is on the disk."""
        lines = [record] if self.records else [self.made_from, record]
        if self.records:
            self._drop_torn_line()
        # A file object writes all or raises; os.write may stop half way on a full disk.
        with open(self.path, "ab" if self.records else "wb") as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(value))
    return result
