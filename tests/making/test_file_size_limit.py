"""A limit on the size of files ends a build in one line, also where the writer gives no reason."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from build.output.output_dir import OutputPlace, staged_directory
from nvlm.program.errors import UserError


@pytest.mark.parametrize("error", [OSError("problem writing element 7"), OSError(errno.EFBIG, "x")])
def test_a_write_that_fails_below_a_limit_names_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """numpy's writer of what ONNX keeps beside the graph gives no number."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    place = OutputPlace(tmp_path / "engine", "--engine_dir", "engine", overwrite=False)
    with pytest.raises(UserError, match="`ulimit -f` allows"), staged_directory(place, 1):
        raise error
    assert list(tmp_path.iterdir()) == []
