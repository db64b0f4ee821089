"""The Serve application: ``serve run deploy.ray_serve.app:build model=... min_replicas=2``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from deploy.ray_serve.endpoint import Endpoint
from deploy.ray_serve.replica import Replica
from deploy.ray_serve.router import PrefixRouter


class Options(BaseModel):
    """What can be set, as ``name=value`` or as ``args`` of a Serve config file.

    Attributes:
        model: as for ``inflightd serve``; None: the embedded default.
        arguments: more of ``inflightd serve``; not an address, which is a unix socket.
        environment: variables of the daemons; keys belong here or into the cluster's own environment.
        min_replicas, max_replicas: Serve moves between them, so that a replica has
            ``target_ongoing_requests``.
        max_ongoing_requests: of a replica; more wait in the endpoint. The daemon has a line of its own, so
            that this is what it runs at a time and a good part of that line.
        upscale_delay_s, downscale_delay_s: for how long there must be too many or too few before Serve moves.
        num_cpus, num_gpus: of a replica, as Ray counts them.
        prefix_chars: so many characters of a prompt decide where it goes.
        slack, free_load: see ``prefix_routing.preference``.
        start_timeout_s: until a daemon takes requests.
        stop_timeout_s: for requests to finish when a replica is taken away.
        endpoints, endpoint_num_cpus: processes that pass bytes on, and what Ray counts for each.
        max_body_bytes: of a request; a larger one is refused before a replica sees it.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    arguments: list[str] = []
    environment: dict[str, str] = {}
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 48
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 256
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    prefix_chars: Annotated[int, Field(ge=1)] = 1024
    slack: Annotated[float, Field(gt=1)] = 1.25
    free_load: Annotated[int, Field(ge=1)] = 8
    start_timeout_s: Annotated[float, Field(gt=0)] = 600
    stop_timeout_s: Annotated[float, Field(ge=0)] = 40
    endpoints: Annotated[int, Field(ge=1)] = 1
    endpoint_num_cpus: Annotated[float, Field(ge=0)] = 0.5
    max_body_bytes: Annotated[int, Field(ge=1)] = 32 * 2**20


def build(arguments: Mapping[str, Any]) -> Application:
    """The endpoint, bound to its replicas. Raises ValidationError if ``arguments`` are no ``Options``."""
    options = Options.model_validate(arguments)
    model = [] if options.model is None else [options.model]
    replica = serve.deployment(
        name="inflightd",
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=max(options.min_replicas, options.max_replicas),
            target_ongoing_requests=options.target_ongoing_requests,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
        ),
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=options.stop_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"slack": options.slack, "free_load": options.free_load},
        ),
    )(Replica)
    endpoint = serve.deployment(
        name="endpoint",
        num_replicas=options.endpoints,
        # Passing bytes on costs little: the replicas say what is too much.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": options.endpoint_num_cpus},
        graceful_shutdown_timeout_s=options.stop_timeout_s,
    )(Endpoint)
    replicas = replica.bind(
        [*model, *options.arguments], options.environment, options.start_timeout_s, options.stop_timeout_s
    )
    return endpoint.bind(replicas, options.prefix_chars, options.max_body_bytes)
