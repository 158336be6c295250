"""A Ray cluster that an application runs on: one of this program's own, or one that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from frontends.ray_serve.app import application
from frontends.ray_serve.options import LOCAL, Options
from nvlm.program.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
APPLICATION = "nvlm"


@contextmanager
def connected(address: str, **resources: int) -> Iterator[dict[str, float]]:
    """A connection to a cluster, with what the cluster has by name. With `LOCAL` it ends with the
    context. Raises `UserError` where there is none.

    resources: of an own cluster, as `ray.init` takes them (default: this machine's).
    """
    environment = {"PYTHONPATH": str(_ROOT)}
    if threads := os.environ.get("OMP_NUM_THREADS"):  # else Ray sets it, to the CPUs of an actor
        environment["OMP_NUM_THREADS"] = threads
    given: dict[str, Any] = {"include_dashboard": False, **resources} if address == LOCAL else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # asks nobody on the internet
    try:
        ray.init(
            address,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": environment},
            **given,
        )
    except ConnectionError as error:
        raise UserError(
            f"--address {address}: there is no Ray cluster ({error}); start one with `ray start`"
        ) from None
    try:
        yield ray.cluster_resources()
    finally:
        if address == LOCAL:
            serve.shutdown()
        ray.shutdown()


def deploy(options: Options, host: str, port: int) -> None:
    """Returns once every replica answers. An application that runs already is replaced, a fifth of
    its replicas at a time. Raises `UserError` where they cannot start.

    host, port: of Ray's proxies, one on each machine with a replica; those of the first call stay.
    """
    _require_room(options, ray.cluster_resources())
    log = {"enable_access_log": False}  # serve.py's says more
    serve.start(
        proxy_location="EveryNode", http_options={"host": host, "port": port}, logging_config=log
    )
    try:
        serve.run(application(options), name=APPLICATION, logging_config=log)
    except RuntimeError as error:
        raise UserError(
            f"the replicas could not be started: {error}; the log above says why"
        ) from None


def remove() -> None:
    """What was accepted is answered first, for --drain_s at most."""
    serve.delete(APPLICATION)


def _require_room(options: Options, resources: dict[str, float]) -> None:
    for name, each in (("GPU", options.num_gpus), ("CPU", options.num_cpus)):
        needed, found = options.min_replicas * each, resources.get(name, 0)
        if needed > found:
            raise UserError(
                f"{options.min_replicas} replicas with {each} {name}s each need {needed}, and the "
                f"cluster has {found:g}; give a smaller --num_replicas or --num_{name.lower()}s, "
                "or add machines"
            )
