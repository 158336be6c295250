"""Step 3 as a server: answers OpenAI's API over HTTP with an engine directory.

serve.py calls `main`. Its life: listen, load, answer, drain, end.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from frontends.openai.flags import parser
from frontends.openai.listener import open_listener
from frontends.openai.supervisor import is_supervised, supervise
from nvlm.program import startup
from nvlm.program.errors import PartDiedError, UserError
from nvlm.program.launcher import World, rank_from
from nvlm.program.process import set_most_pixels, set_picture_types
from runtime.serving.launch import Program, engine_options, launch
from runtime.serving.picture_types import SERVER_PICTURE_TYPES
from runtime.serving.rehearsal import rehearse
from runtime.serving.runner import Runner
from runtime.serving.server import Server

if TYPE_CHECKING:
    from frontends.openai.door import Door, DoorOptions
    from frontends.openai.guard import Guard

log = logging.getLogger("nvlm.serve")

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_POLL_S = 0.1
_SHOWN_FAILED_S = 5.0
"""Probes see a decoder that failed for so long before the program ends."""


def lead(
    arguments: argparse.Namespace, device: torch.device, open_runner: Callable[[], Runner]
) -> int:
    """What rank 0 does, or the only one."""
    if arguments.restart and not is_supervised():
        return supervise(arguments.host, arguments.port)
    from frontends.openai.access_log import open_log
    from frontends.openai.app import application
    from frontends.openai.door import Door
    from frontends.openai.http_server import HttpServer
    from frontends.openai.protocol import Timeouts

    options, guard = rules(arguments)
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    set_picture_types(SERVER_PICTURE_TYPES)
    open_log(arguments.access_log)
    door = Door(options)
    listener = open_listener(arguments.host, arguments.port)
    startup.show()
    imported_s = startup.process_age_s()
    timeouts = Timeouts(arguments.header_timeout_s, arguments.write_timeout_s)
    http = HttpServer(application(door, guard), listener, timeouts)
    with http, open_runner() as runner:
        startup.took("importing", imported_s)  # not before a mistake, which is one line
        stop = _Stop()
        server = Server(
            runner,
            max_queue_size=arguments.max_queue_size,
            num_preparing=arguments.num_preparing,
            hang_after_s=arguments.hang_after_s,
        )
        try:
            rehearse(server)
            _freeze()
            startup.took("all of it", startup.process_age_s())
            door.open(server)
            log.info(
                "ready: http://%s:%d/v1 serves %s on %s, with a page at /; Control-C stops it",
                _url_host(arguments.host),
                http.port,
                options.models[0],
                device,
            )
            while not (stop.is_asked or server.has_failed):
                stop.wait(_POLL_S)
            if server.has_failed:
                if arguments.restart:
                    _wait_for_failure(server)
                else:
                    time.sleep(_SHOWN_FAILED_S)
                raise server.failure or PartDiedError("another rank died; the server ends")
            door.drain()
            _drain(door, server, arguments.drain_s)
        finally:
            door.close()
            server.close()
    return 0


def _freeze() -> None:
    """The garbage collector passes over what is there now, torch's objects above all: a full pass
    stops every thread for a tenth of a second."""
    gc.collect()
    gc.freeze()


def _wait_for_failure(server: Server) -> None:
    """With --restart probes see the failure until the next start is ready, so this process ends as
    soon as it knows the reason."""
    deadline = time.monotonic() + _SHOWN_FAILED_S
    while server.failure is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _drain(door: Door, server: Server, drain_s: float) -> None:
    """Waits for the answers of what was accepted. A second signal ends the waiting."""
    num_open = door.num_calls
    log.info("stopping: %d requests are answered first", num_open)
    deadline = time.monotonic() + drain_s
    while (door.num_calls or server.num_open) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if left := door.num_calls:
        log.warning("%d requests were not answered within %g s", left, drain_s)


class _Stop:
    """SIGTERM and Control-C ask for an orderly end; the second one interrupts."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def wait(self, seconds: float) -> None:
        self._asked.wait(seconds)

    def _ask(self, *_: object) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()


def rules(arguments: argparse.Namespace) -> tuple[DoorOptions, Guard]:
    """What the flags let clients do. Raises `UserError` for a flag that makes no sense."""
    from frontends.openai.door import DoorOptions
    from frontends.openai.guard import (
        Guard,
        host_names,
        is_loopback,
        origin_names,
        own_names,
        read_keys,
    )
    from frontends.openai.requests.media import MediaRules, domains_of

    if "" in arguments.model_name:
        raise UserError("--model_name has an empty name; give one that clients can ask for")
    hosts = host_names(arguments.allowed_host)
    if is_loopback(arguments.host):
        hosts |= own_names(arguments.host)
    keys = read_keys(arguments.api_key_file) if arguments.api_key_file else ()
    media = MediaRules(
        domains_of(arguments.allowed_media_domain),
        arguments.max_media_bytes,
        arguments.media_timeout_s,
    )
    options = DoorOptions(
        tuple(arguments.model_name),
        media,
        max_body_bytes=arguments.max_body_bytes,
        max_open_bytes=arguments.max_open_bytes,
        body_timeout_s=arguments.body_timeout_s,
        logs_text=arguments.log_text,
    )
    return options, Guard(keys, hosts or None, origin_names(arguments.allowed_origin))


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def require_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the server needs {' and '.join(missing)}, which this Python has not; "
            "pip install -r requirements/serving.txt"
        )


def _parse() -> Program:
    """Reads the command line. Every rank does."""
    arguments = parser().parse_args()
    if arguments.restart and (size := World.from_environment(os.environ).size) > 1:
        raise UserError(
            f"--restart starts a server of one process again, found {size} ranks; leave it out, "
            "and have the job started again by what runs mpirun"
        )
    if rank_from(os.environ) == 0:
        require_packages()
    else:
        # mpirun signals all ranks; the others end with the leader, once it has drained.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if arguments.max_image_pixels is not None:
        set_most_pixels(arguments.max_image_pixels)
    options = engine_options(arguments)
    return Program(arguments.engine_dir, arguments.device, options, partial(lead, arguments))


def main() -> int:
    logging.getLogger("frontends").setLevel(logging.INFO)
    return launch(os.environ, _parse)
