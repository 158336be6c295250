"""Serves an engine directory with Triton Inference Server until it is asked to stop.

python -m frontends.triton.serve --engine_dir D [--http_port N --grpc_port N --metrics_port N]
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from frontends.triton.closed import CLOSED_APIS
from frontends.triton.model_pipe import HANG_AFTER_S, End, ModelPipe
from frontends.triton.render import ServeOptions, form_of, processes_of, render
from frontends.triton.scratch import scratch_folder
from frontends.triton.server import Ports, TritonServer
from nvlm.program.command_line import ArgumentParser, positive_float, positive_int, run
from nvlm.program.errors import PartDiedError, UserError
from nvlm.program.restarts import Restarts
from runtime.decoder.executor import require_own_scheduler
from runtime.engine.engine_dir import EngineDir
from runtime.serving.launch import add_place_flags, add_queue_flag, add_step_flag

_ANSWERED_S = 5.0  # for answers on their way to clients


def parser() -> ArgumentParser:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0], "python -m frontends.triton.serve")
    group = parser.add_argument_group
    add = group("engine").add_argument
    add_place_flags(add)
    add(
        "--form",
        choices=("auto", "torch", "tensorrt_llm"),
        default="auto",
        help="models of the repository; auto: those of the engine's decoder",
    )
    add(
        "--num_threads",
        type=positive_int,
        metavar="N",
        help="torch's CPU threads in each model (default: torch's choice)",
    )
    add_step_flag(add, is_service=True)
    add = group("clients").add_argument
    add("--address", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    add("--http_port", type=positive_int, default=8000, metavar="PORT", help="port for HTTP")
    add("--grpc_port", type=positive_int, default=8001, metavar="PORT", help="port for gRPC")
    add("--metrics_port", type=positive_int, default=8002, metavar="PORT", help="port for metrics")
    add_queue_flag(add)
    add("--unary", action="store_true", help="one response a request: no streaming")
    add(
        "--open_api",
        nargs="+",
        choices=CLOSED_APIS,
        default=[],
        metavar="API",
        help=f"Triton's APIs that clients may call beside asking, of {', '.join(CLOSED_APIS)}",
    )
    add = group("operation").add_argument
    add(
        "--log_file",
        type=Path,
        metavar="FILE",
        help="file to append the log to (default: a temporary file)",
    )
    add(
        "--startup_timeout_s",
        type=positive_float,
        default=900.0,
        metavar="SECONDS",
        help="seconds in which the server must have started and answered a question",
    )
    add(
        "--restart",
        action="store_true",
        help="start the server again after a part of it died, three times in ten minutes at most",
    )
    add(
        "--hang_after_s",
        type=positive_float,
        metavar="SECONDS",
        help="seconds without progress after which the server counts as hung (default: computed "
        "from the engine's plan)",
    )
    return parser


def main() -> int:
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, _stop)
    engine = EngineDir.read(arguments.engine_dir)
    form = form_of(engine) if arguments.form == "auto" else arguments.form
    ports = Ports(
        arguments.address, arguments.http_port, arguments.grpc_port, arguments.metrics_port
    )
    options = ServeOptions(
        form,
        arguments.device,
        arguments.num_threads or 0,
        arguments.max_queue_size,
        not arguments.unary,
        ports.grpc_url,
        arguments.hang_after_s or 0.0,
        arguments.max_step_ms,
    )
    world_size = engine.checkpoint_config.world_size
    require_own_scheduler(engine, arguments.max_step_ms)
    if form == "torch" and world_size > 1:
        raise UserError(
            f"{arguments.engine_dir} was converted for {world_size} ranks, and Triton runs decoder "
            "'torch' on one; convert with --tp_size 1, or build with --decoder tensorrt_llm"
        )
    restarts = Restarts()
    while True:
        end, log = _serve(engine, options, ports, arguments)
        kept = f"its log is kept in {log}"
        if end.is_mistake:
            raise UserError(f"{end.reason}; {kept}")
        if not arguments.restart:
            raise PartDiedError(f"{end.reason}; {kept}")
        restarts.again(end.reason, kept)


def _serve(
    engine: EngineDir, options: ServeOptions, ports: Ports, arguments: argparse.Namespace
) -> tuple[End, Path]:
    """Waits until the server must end; returns why, and its log."""
    world_size, log = engine.checkpoint_config.world_size, arguments.log_file
    with scratch_folder() as made, ExitStack() as pipes:
        scratch = made.path
        if not str(scratch).isascii():
            raise UserError(
                f"temporary files go to {scratch}, expected ASCII, which alone Triton's Python "
                "backend reads; set TMPDIR to another folder"
            )
        repository = scratch / "models"
        repository.mkdir()
        hang_after_s = arguments.hang_after_s or HANG_AFTER_S
        opened = {
            model: pipes.enter_context(closing(ModelPipe(scratch, model, hang_after_s)))
            for model in processes_of(options.form)
        }
        pipe_paths = {model: pipe.path for model, pipe in opened.items()}
        render(engine, repository, replace(options, pipes=pipe_paths))
        with TritonServer(
            repository,
            scratch,
            ports,
            world_size=world_size,
            log=log,
            open_apis=arguments.open_api,
            pipes=tuple(opened.values()),
            regions=made.regions,
            inherited=(made.lock,),
        ) as server:
            try:
                server.wait_until_ready(arguments.startup_timeout_s)
            except UserError as error:
                raise UserError(f"{error}; its log is kept in {log or _kept(server.log)}") from None
            print(
                f"ready: http {ports.http}, grpc {ports.grpc}, metrics {ports.metrics} on "
                f"{ports.address} ({options.form}); log {server.log}; Control-C stops it",
                file=sys.stderr,
                flush=True,
            )
            end = server.wait_for_end()
            # What nobody can answer any more ends with its connection.
            server.stop(_ANSWERED_S if end.is_answered else 0.0)
            return end, log or _kept(server.log)


def _stop(*_: object) -> NoReturn:
    """What a service manager sends to stop a server is no failure."""
    sys.exit(0)


def _kept(log: Path) -> Path:
    """A copy that outlives the scratch directory."""
    descriptor, name = tempfile.mkstemp(prefix="nvlm_tritonserver_", suffix=".log")
    with open(descriptor, "wb") as copy:
        copy.write(log.read_bytes())
    return Path(name)


if __name__ == "__main__":
    run(main)
