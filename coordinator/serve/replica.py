"""The server as a replica of something that takes requests for many, such as Ray Serve.

Each replica loads a model of its own and answers as the server does; who started it chooses which gets a request.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp

from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.serve.app import make_app
from warmfront.coordinator.serve.live import attach
from warmfront.coordinator.serve.service import Service
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError

__all__ = ["make_replica", "replica_options"]

# Requests under way in a replica before another is started, and at most: the rest waits in Ray's queue.
_TARGET, _MOST = 2, 16
_LOOK_S = 1.0


def make_replica(model: str, name: str, keys: tuple[str, ...], options: Mapping[str, Any]) -> ASGIApp:
    """The application of one replica, once its model is loaded with these fields of EngineConfig.

    Its workers end with its process, and that ends if the engine fails for good, so that another takes its place.
    """
    service = Service(name)
    app = make_app(service, keys=keys, local=False)
    engine = AsyncEngine(Engine.load(model, **options), queue=service.limits.queue)
    attach(service, engine)
    threading.Thread(target=_end_with, args=(engine,), name="warmfront-replica", daemon=True).start()
    return app


def _end_with(engine: AsyncEngine) -> None:
    while engine.failure is None:
        time.sleep(_LOOK_S)
    os._exit(1)


def replica_options(arguments: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """From the arguments of `serve run`, which are texts: those of `make_replica`, and Ray's settings.

    model, name, api_key, replicas (MIN:MAX), cpus, gpus; any other is a field of EngineConfig. Raises UsageError.
    """
    rest = dict(arguments)
    model = rest.pop("model", "smollm2-135m")
    name, key = rest.pop("name", model.rstrip("/").rpartition("/")[2]), rest.pop("api_key", "")
    low, _, high = rest.pop("replicas", "1").partition(":")
    try:
        scaling = {
            "min_replicas": int(low),
            "max_replicas": int(high or low),
            "target_ongoing_requests": _TARGET,
        }
        actor = {"num_cpus": float(rest.pop("cpus", "1")), "num_gpus": float(rest.pop("gpus", "0"))}
    except ValueError as error:
        raise UsageError(f"replicas, cpus and gpus are numbers: {error}") from None
    if not 1 <= scaling["min_replicas"] <= scaling["max_replicas"]:
        raise UsageError(f"replicas={low}:{high}: 1 or more, and the lower number first")
    # Told here, once: each replica would fail, and be replaced by another that does.
    if unknown := rest.keys() - {field.name for field in dataclasses.fields(EngineConfig)}:
        raise UsageError(f"no such setting: {', '.join(sorted(unknown))}")
    options = {field: int(value) if value.isdecimal() else value for field, value in rest.items()}
    settings = {"autoscaling_config": scaling, "ray_actor_options": actor, "max_ongoing_requests": _MOST}
    return {"model": model, "name": name, "keys": (key,) if key else (), "options": options}, settings
