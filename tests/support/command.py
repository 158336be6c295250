"""Runs the entry scripts as a user would, and says what a refusal must look like.

In this process by default (a process that imports torch takes seconds); `run_process` starts a
real one; `background` starts one that the test may signal, from a server that has torch imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from PIL import Image

from nvlm.program import command_line

ROOT = Path(__file__).resolve().parents[2]
CONVERT, BUILD, RUN, EVALUATE = "convert_checkpoint", "build_engine", "run", "evaluate"
GENERATE, SCORE = (EVALUATE, "generate"), (EVALUATE, "score")
EXIT_USER_ERROR = 2

PLAIN = ("--quant_algo", "none", "--device", "cpu")
"""Flags that convert without calibration, which is faster."""

_LOGGERS = ("nvlm", "build", "runtime", "__main__")


@dataclass(frozen=True, slots=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return self.stderr.rstrip("\n").rpartition("\n")[2]


@cache
def script(name: str) -> ModuleType:
    """The module of an entry script, whatever sys.path holds."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_command(name: str, *arguments: object) -> Result:
    """`python <name>.py <arguments>` in this process; an exception of ours passes through."""
    levels = {logger: logging.getLogger(logger).level for logger in _LOGGERS}
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = None
    Image.init()
    try:
        with (
            patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]),
            patch.object(Image, "ID", [*Image.ID]),  # servers have Pillow read less
            redirect_stdout(stdout),
            redirect_stderr(stderr),
            _shown_warnings(),
        ):
            command_line.run(script(name).main)
    except SystemExit as error:
        code = error.code
    finally:
        for logger, level in levels.items():
            logging.getLogger(logger).setLevel(level)
    assert isinstance(code, int), f"exit code {code!r}"
    return Result(code, stdout.getvalue(), stderr.getvalue())


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Prints warnings to stderr, as Python does where no pytest collects them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning, FutureWarning):
            warnings.simplefilter("always", category)
        with patch.object(warnings, "showwarning", _show_warning):
            yield


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)


def run_process(
    name: str,
    *arguments: object,
    stdout: int = subprocess.PIPE,
    environment: dict[str, str] | None = None,
) -> Result:
    """`python <name>.py <arguments>` for real."""
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        timeout=120,
        check=False,
    )
    return Result(done.returncode, (done.stdout or b"").decode(), done.stderr.decode())


def one_line_error(result: Result, *fragments: str) -> str:
    """Asserts a refusal: exit code 2, nothing on stdout, one line that holds every fragment.

    Progress bars may stand before the line. Returns it.
    """
    message = f"exit code {result.exit_code}\nstdout: {result.stdout}\nstderr: {result.stderr}"
    assert result.exit_code == EXIT_USER_ERROR, message
    assert result.stdout == "", message
    assert "Traceback" not in result.stderr, message
    assert "Warning" not in result.stderr, message
    # A progress bar that was interrupted leaves its carriage return, not a newline.
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, message
    assert result.error == lines[0], message
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in\n{lines[0]}"
    return lines[0]


def tree(root: Path) -> dict[str, str]:
    """Every path below `root`, with the SHA-256 of files."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in sorted(root.rglob("*"))
    }


def refused(root: Path, name: str, *arguments: object, fragments: tuple[str, ...] = ()) -> str:
    """Asserts that a command is refused in one line and leaves everything below `root` as it is."""
    before = tree(root)
    line = one_line_error(run_command(name, *arguments), *fragments)
    assert tree(root) == before, "the refused command changed files"
    return line


@dataclass(frozen=True, slots=True)
class Background:
    """A running command in a session of its own."""

    process: ForkServerProcess
    log: Path

    def kill(self, signal_number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, signal_number)

    def wait(self, timeout: float = 60.0) -> Result:
        """A negative exit code is the signal that ended it. stdout is in stderr too."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s\n{self.log.read_text()}")
        return Result(self.process.exitcode, "", self.log.read_text(errors="replace"))


def background(
    name: str,
    *arguments: object,
    log: Path,
    watched: Path | None = None,
    kill_at: int = 0,
    kill_with: int = signal.SIGKILL,
) -> Background:
    """Starts a command. With `kill_at` it sends itself a signal just before its `kill_at`th change
    of the file system below `watched`; the count of changes lands in `<log>.count`.
    """
    log.write_bytes(b"")  # a kill may come before the child opens it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.command_preload"])
    process = context.Process(
        target=_child, args=(name, [*map(str, arguments)], log, watched, kill_at, kill_with)
    )
    # Only the first start matters: the server, which has to find our modules, comes to life there.
    with patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
        process.start()
    return Background(process, log)


def _child(
    name: str,
    arguments: list[str],
    log: Path,
    watched: Path | None,
    kill_at: int,
    kill_with: int,
) -> None:
    os.setsid()
    os.chdir(ROOT)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [f"{name}.py", *arguments]
    count = _kill_at_change(watched, kill_at, kill_with) if watched else [0]
    try:
        command_line.run(script(name).main)
    finally:
        sys.stdout.flush()
        if watched:
            log.with_name(log.name + ".count").write_text(str(count[0]))


_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def _kill_at_change(watched: Path, kill_at: int, kill_with: int) -> list[int]:
    """Counts changes below `watched` (files opened for writing, written, synced, renamed, ...)."""
    count = [0]
    root = str(watched)

    def change() -> None:
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), kill_with)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        is_write = event == "open" and int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)
        # With a directory descriptor (shutil.rmtree) the path is relative: counted as well.
        if (is_write or event in _CHANGES) and (
            root in str(arguments[0]) or not str(arguments[0]).startswith("/")
        ):
            change()

    def counted(function_name: str) -> None:
        original = getattr(os, function_name)

        def wrapper(*arguments: object) -> object:
            change()
            return original(*arguments)

        setattr(os, function_name, wrapper)

    sys.addaudithook(audit)
    for function_name in ("pwrite", "fsync", "posix_fallocate"):
        counted(function_name)
    return count
