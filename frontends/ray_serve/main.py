"""Starts replicas of serve.py on a Ray cluster, or replaces those that run, one after the other."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from importlib.util import find_spec

from frontends.openai.listener import open_listener
from frontends.openai.main import require_packages, rules
from frontends.ray_serve.options import LOCAL, Options, read_options
from nvlm.program.errors import UserError

log = logging.getLogger("nvlm.ray_serve")

_CONNECT_S = 5.0
_PACKAGES = ("ray", "fastapi", "aiohttp")  # of `ray[serve]`; `ray` alone has not the others


def main() -> int:
    flags = sys.argv[1:]
    arguments = read_options(flags, num_cluster_gpus=0).arguments
    require_packages()
    _require_sense(arguments)
    if any(find_spec(name) is None for name in _PACKAGES):
        raise UserError(
            "Ray Serve is not installed; pip install -r requirements/ray.txt on every machine"
        )
    from frontends.ray_serve.cluster import connected, deploy, remove

    with connected(arguments.address) as resources:
        options = read_options(flags, resources.get("GPU", 0))
        deploy(options, arguments.host, arguments.port)
        is_own = arguments.address == LOCAL
        log.info(
            "ready: http://%s:%d/v1 serves %s by %s; %s",
            arguments.host,
            arguments.port,
            arguments.model_name[0],
            _replicas(options),
            "Control-C stops it" if is_own else "`serve shutdown` stops it",
        )
        if is_own:
            _until_signalled()
            log.info("stopping: what was accepted is answered first")
            remove()
    return 0


def _require_sense(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for what an ingress or a proxy would stumble over, in a long log."""
    from frontends.openai.access_log import open_log

    rules(arguments)
    open_log(arguments.access_log)
    if arguments.address == LOCAL:
        open_listener(arguments.host, arguments.port).close()
    else:
        _require_cluster(arguments.address)


def _require_cluster(address: str) -> None:
    """Raises `UserError` for HOST:PORT where nothing listens; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # auto, or what Ray refuses at once
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: there is no Ray cluster ({error}); start one with `ray start`"
        ) from None


def _replicas(options: Options) -> str:
    if options.is_autoscaled:
        return f"{options.min_replicas} to {options.max_replicas} replicas"
    return f"{options.min_replicas} replica{'s' if options.min_replicas > 1 else ''}"


def _until_signalled() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass
