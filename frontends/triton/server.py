"""Runs a tritonserver process on a rendered repository: start, wait until it answers, stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from frontends.triton.closed import closing_flags
from frontends.triton.model_pipe import End, ModelPipe
from frontends.triton.program import Program, find_program
from nvlm.program.child import ends_with_us
from nvlm.program.errors import UserError, shown
from nvlm.program.signal_names import how_it_ended

EXIT_TIMEOUT_S = 20  # for requests in flight
STOP_TIMEOUT_S = EXIT_TIMEOUT_S + 20.0
LOOK_S = 0.5
# Whether tritonserver itself is alive: asked so often, and given up after so many in a row.
_ASK_S, _ASK_TIMEOUT_S, _MOST_UNHEARD = 10.0, 2.0, 6
_FRAME = re.compile(r"\s*\d+# ")  # a line of the stack that a dying tritonserver prints


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a server listens."""

    address: str = "127.0.0.1"  # of an interface
    http: int = 8000  # port
    grpc: int = 8001  # port
    metrics: int = 8002  # port

    @property
    def host(self) -> str:
        """Where this machine reaches it."""
        return "127.0.0.1" if self.address == "0.0.0.0" else self.address

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc}"

    def require_free(self) -> None:
        """Triton itself would wait, or serve the other ports."""
        if len({self.http, self.grpc, self.metrics}) < 3:
            raise UserError(
                f"the ports {self.http}, {self.grpc} and {self.metrics} are not three; choose "
                "others with --http_port, --grpc_port and --metrics_port"
            )
        for flag, port in (
            ("--http_port", self.http),
            ("--grpc_port", self.grpc),
            ("--metrics_port", self.metrics),
        ):
            try:
                socket.create_server((self.address, port)).close()
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"port {port} of {self.address} cannot be used ({reason}); choose "
                    f"another with {flag}"
                ) from None


def server_command(
    program: Program,
    repository: Path,
    ports: Ports,
    prefix: str,
    world_size: int,
    open_apis: Collection[str] = (),
) -> list[str]:
    """One server, or under mpirun one per rank of which rank 0 alone answers.

    The flags per rank are those of TensorRT-LLM's launch_triton_server.py.
    """
    common = [str(program.path), *program.flags, f"--model-repository={repository}"]
    common += ["--disable-auto-complete-config", f"--exit-timeout-secs={EXIT_TIMEOUT_S}"]
    common += closing_flags(open_apis)

    def rank_flags(rank: int) -> list[str]:
        flags = [
            f"--http-port={ports.http + 10 * rank}",
            f"--grpc-port={ports.grpc + 10 * rank}",
            f"--metrics-port={ports.metrics + 10 * rank}",
            f"--backend-config=python,shm-region-prefix-name={prefix}{rank}_",
        ]
        flags += [f"--{kind}-address={ports.address}" for kind in ("http", "grpc", "metrics")]
        if rank > 0:
            flags += ["--model-control-mode=explicit", "--load-model=tensorrt_llm"]
        return flags

    if world_size == 1:
        return [*common, *rank_flags(0)]
    command = ["mpirun", "--allow-run-as-root"]
    for rank in range(world_size):
        command += [*([":"] if rank else []), "-n", "1", *common, *rank_flags(rank)]
    return command


def _mpirun(world_size: int) -> str:
    """The user's, whatever the program's environment puts before it."""
    if (path := shutil.which("mpirun")) is not None:
        return path
    raise UserError(
        f"the engine has {world_size} ranks, which mpirun starts, and it is not installed; use "
        "NVIDIA's container, which has Open MPI"
    )


def _open_log(path: Path) -> BinaryIO:
    """Opens the log for appending; what it holds is kept."""
    try:
        return open(path, "ab")
    except OSError as error:
        raise UserError(
            f"--log_file {path} cannot be written: {error.strerror}; choose another"
        ) from None


class TritonServer:
    """A server process; `stop` (or leaving the `with`) ends it and removes what it left."""

    def __init__(
        self,
        repository: Path,
        scratch: Path,
        ports: Ports,
        *,
        world_size: int = 1,
        log: Path | None = None,
        open_apis: Collection[str] = (),
        pipes: Sequence[ModelPipe] = (),
        regions: str | None = None,
        inherited: Collection[int] = (),
    ) -> None:
        """pipes: of the repository's models that have a process; `look` reads them. regions: what
        the names of its shared memory begin with. inherited: descriptors that stay open in it."""
        ports.require_free()
        program = find_program(scratch)
        self.ports = ports
        self.log = log or scratch / "tritonserver.log"
        self._prefix = regions or f"nvlm_{os.getpid()}_{id(self):x}_"
        command = server_command(program, repository, ports, self._prefix, world_size, open_apis)
        self._pipes, self._looked, self._asked = pipes, time.monotonic(), time.monotonic()
        self._num_unheard = 0
        if world_size > 1:
            command[0] = _mpirun(world_size)
        with _open_log(self.log) as file:
            self._log_start = file.tell()
            self.process = subprocess.Popen(
                ends_with_us(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **program.environment},
                start_new_session=True,
                pass_fds=inherited,
            )

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once a question was really answered: models may be "ready" and yet be unable to.

        Raises `UserError` when the server ends before, or `timeout_s` is over.
        """
        deadline = time.monotonic() + timeout_s
        while not self._answers("health/ready", 5):
            self._close_regions()
            if (code := self.process.poll()) is not None:
                how = f", {how_it_ended(code)}" if code < 0 else ""
                raise UserError(f"tritonserver ended while starting{how}: {self.last_error()}")
            if time.monotonic() > deadline:
                raise UserError(
                    f"tritonserver is not ready after {timeout_s:g} s: {self.last_error()}; a "
                    "large engine needs a larger --startup_timeout_s"
                )
            time.sleep(0.05)
        self._close_regions()
        self._ask(max(1.0, deadline - time.monotonic()))

    def look(self) -> End | None:
        """Why the server, or a process of a model of it, is of no more use, if one is."""
        now = time.monotonic()
        since_last_s, self._looked = min(now - self._looked, 2 * LOOK_S), now
        for pipe in self._pipes:
            if (end := pipe.look(since_last_s)) is not None:
                return end
        if (code := self.process.poll()) is not None:
            last_error = "" if code < 0 else f": {self.last_error()}"
            return End(f"tritonserver was ended {how_it_ended(code)}{last_error}")
        if now - self._asked > _ASK_S:
            self._asked = now
            self._num_unheard = 0 if self._answers("health/live") else self._num_unheard + 1
            if self._num_unheard > _MOST_UNHEARD:
                return End(f"tritonserver has not answered {self._num_unheard} times in a row")
        return None

    def wait_for_end(self) -> End:
        while (end := self.look()) is None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(LOOK_S)
        return end

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ends requests in flight, then the server; kills what takes too long or outlives it."""
        with suppress(subprocess.TimeoutExpired):
            if self.process.poll() is None and timeout_s:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout_s)
        with suppress(ProcessLookupError):  # the backends of a server that dies live on
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in self._regions():
            region.unlink(missing_ok=True)  # what a backend that died has left

    def _regions(self) -> Iterator[Path]:
        """The shared memory in which tritonserver and its models hold what clients ask."""
        return Path("/dev/shm").glob(f"{self._prefix}*")

    def _close_regions(self) -> None:
        """Takes them from other users, who may read what Triton makes, whatever the umask."""
        for region in self._regions():
            with suppress(OSError):
                region.chmod(0o600)

    def _urlopen(self, request: str | urllib.request.Request, timeout_s: float) -> Any:
        """Asks this machine's server itself, also where http_proxy is set."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(request, timeout=timeout_s)

    def _url(self, path: str) -> str:
        return f"http://{self.ports.host}:{self.ports.http}/v2/{path}"

    def _answers(self, path: str, timeout_s: float = _ASK_TIMEOUT_S) -> bool:
        try:
            with self._urlopen(self._url(path), timeout_s) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _ask(self, timeout_s: float) -> None:
        question = json.dumps({"text_input": "Ready?", "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url("models/nvlm/generate"), question, headers)
        try:
            with self._urlopen(request, timeout_s) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise UserError(f"tritonserver is up but cannot answer: {shown(answer)}") from None
        except OSError as error:
            raise UserError(f"tritonserver is up but does not answer: {error}") from None
        if answer.get("num_tokens") != 1 and answer.get("finish_reason") != "stop":
            raise UserError(f"tritonserver is up but answers {shown(answer)}, expected one token")

    def last_error(self) -> str:
        """What the log says last of an error, without Triton's own prefix and trace."""
        text = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not _FRAME.match(line)]
        lines = lines or ["it wrote no log"]
        failures = [
            line for line in lines if re.match(r"E\d{4} ", line) and "failed to load" in line
        ]
        errors = failures or [line for line in lines if line.startswith("error:")] or lines
        line = re.sub(r"^E\d{4} \S+ \d+ \S+ ", "", errors[-1].strip())
        return line.split("\\n\\nAt:")[0].strip('"')
