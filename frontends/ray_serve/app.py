"""The application of Ray Serve: an ingress before the replicas, and what Ray is to keep running."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from frontends.openai.access_log import open_log
from frontends.openai.main import rules
from frontends.ray_serve import ingress
from frontends.ray_serve.options import Options, flags_of, read_options
from frontends.ray_serve.replica import Replica
from frontends.ray_serve.router import AffinityRouter

_NUM_INGRESS_CALLS = 4096
"""Open at once in one ingress, which holds no engine."""


class Ingress:
    def __init__(self, replicas: DeploymentHandle[Any], options: Options) -> None:
        self._replicas, self._options = replicas, options

    def __serve_build_asgi_app__(self) -> Any:
        open_log(self._options.arguments.access_log)
        return ingress.application(self._replicas, *rules(self._options.arguments))


def application(options: Options) -> serve.Application:
    replicas = serve.deployment(
        Replica,
        name="Replica",
        ray_actor_options={"num_gpus": options.num_gpus, "num_cpus": options.num_cpus},
        max_ongoing_requests=options.max_open,
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter,
            request_router_kwargs={"spill_at": options.spill_at},
        ),
        **_scale(options),
    ).bind(options.command)
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=options.num_ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_NUM_INGRESS_CALLS,
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    ).bind(replicas, options)


def build(arguments: dict[str, Any]) -> serve.Application:
    """For a config file of `serve deploy` and KubeRay, whose `args` are flags without dashes."""
    import ray

    return application(read_options(flags_of(arguments), ray.cluster_resources().get("GPU", 0)))


def _scale(options: Options) -> dict[str, Any]:
    if not options.is_autoscaled:
        return {"num_replicas": options.min_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
        )
    }
