"""The server as a Ray Serve application: copies of it on a cluster, each with a model of its own behind one address.

    neuronlens deploy STORE --model PATH_OR_ID --replicas 2

    # or a Serve configuration file, of which infra/kuberay/rayservice.yaml is one
    applications:
      - name: neuronlens
        route_prefix: /
        import_path: neuronlens.serving.ray_serve:build
        args: {sources: [s3://bucket/run], model: some/model, replicas: 2, gpus_per_replica: 1}

A replica that dies, or whose engine does, is replaced; one that is told to go finishes its requests first. Keys are
read by each replica where it runs, from `api_key_file` or its environment, and are in no configuration.
"""

import os
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field, model_validator
from ray import serve
from ray.serve import Application

from neuronlens.errors import RunFailed, UsageError
from neuronlens.serving.assembly import ServiceSpec, assemble

NAME = "neuronlens"
"""Of the Serve application, and of its one deployment."""

_HEALTH_PERIOD_SECONDS = 5
_HEALTH_TIMEOUT_SECONDS = 30
_DRAIN_LOOP_SECONDS = 0.5
_MAX_STARTS = 3
"""How often a replica that does not start is tried again: what fails is a model or a store, and stays so."""


class DeployArgs(ServiceSpec):
    """What the application is built from: the `args` of a Serve configuration. Paths are those of the replicas'
    nodes."""

    replicas: int = Field(default=2, gt=0)
    """The copies; with max_replicas, the fewest."""
    max_replicas: int | None = Field(default=None, gt=0)
    """Up to so many, while each has more than `max_batch` requests at work."""
    cpus_per_replica: float = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=0, ge=0)
    drain_seconds: float = Field(default=30, gt=0)
    """What running requests get when a replica is told to go."""
    api_key_file: str | None = None
    """Keys, as `neuronlens serve --api-key-file` reads them; beside it NEURONLENS_API_KEY and NEURONLENS_WRITE_KEY."""
    no_auth: bool = False
    """Start without keys, too. Without it a replica that finds none refuses, since it cannot know who reaches it."""

    @model_validator(mode="after")
    def _replicas_fit(self) -> "DeployArgs":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, and {self.replicas} replicas are always there; give at least "
                "as many"
            )
        return self


class Replica:
    """One copy of the server. Serve's own part of it holds the application as `app`."""

    app: FastAPI

    async def check_health(self) -> None:
        """Raises where the engine has died: Serve then puts another replica in this one's place."""
        engine = self.app.state.service.engine
        if engine is not None and not engine.ready:
            raise RunFailed("The engine of this replica has ended; expected it to run until the replica is told to go.")


def build(args: DeployArgs) -> Application:
    """The application that `serve.run` and Serve's configuration files take."""

    def application() -> FastAPI:
        _settle_in(args)
        return application_of(args)

    deployment = serve.deployment(serve.ingress(application)(Replica), name=NAME, **deployment_options(args))
    return deployment.bind()


def deployment_options(args: DeployArgs) -> dict[str, Any]:
    """What Serve is asked for: how many replicas, with what, and how they begin and end."""
    scale: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": args.replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.max_batch,
            }
        }
    return scale | {
        # Beyond these the application itself says 429; Serve would let them wait without an end.
        "max_ongoing_requests": args.max_batch + args.settings.limits.queue,
        "ray_actor_options": {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
        "graceful_shutdown_timeout_s": args.drain_seconds,
        "graceful_shutdown_wait_loop_s": _DRAIN_LOOP_SECONDS,
        "health_check_period_s": _HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": _HEALTH_TIMEOUT_SECONDS,
        "max_constructor_retry_count": _MAX_STARTS,
    }


def application_of(args: DeployArgs) -> FastAPI:
    """The application of one replica. Raises UsageError where it may not start, or cannot."""
    from neuronlens.serving.app import create_app
    from neuronlens.serving.auth import Keys
    from neuronlens.serving.logs import log

    path = None if args.api_key_file is None else Path(args.api_key_file)
    keys = Keys.load(path, os.environ, warn=log.warning)
    if not keys and not args.no_auth:
        raise UsageError(
            "The replica found no keys, and cannot know who reaches it. Give api_key_file, a file on every node, or "
            "set NEURONLENS_API_KEY on the nodes; no_auth: true starts it without."
        )
    if args.device == "auto" and not args.gpus_per_replica:
        args = args.model_copy(update={"device": "cpu"})  # the GPUs of its node are others'
    return create_app(assemble(args, keys))


def _settle_in(args: DeployArgs) -> None:
    """Make the replica's process the server's."""
    from neuronlens.serving.logs import configure
    from neuronlens.serving.server import SWITCH_SECONDS

    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(args.cpus_per_replica))))  # read when torch is imported
    configure()
