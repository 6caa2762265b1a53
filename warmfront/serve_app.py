"""For Ray Serve: `serve run warmfront.serve_app:deployment model=MODEL replicas=1:4 cpus=8`; see docs/deploy.md."""

from collections.abc import Mapping
from typing import Any

from ray import serve

from warmfront.coordinator.serve.replica import make_replica, replica_options

__all__ = ["deployment"]


def deployment(arguments: Mapping[str, str]) -> Any:
    """The application for these arguments; see `replica_options`."""
    made, settings = replica_options(arguments)

    def build() -> Any:  # in the replica's process
        return make_replica(**made)

    return serve.deployment(name="warmfront", **settings)(serve.ingress(build)()).bind()
