"""Stands for parts of Ray Serve that a handle has."""

from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

DEPLOYMENT = DeploymentID(name="stage", app_name="test")


class Candidate:
    """A replica with a number of requests, as a request router sees it."""

    max_ongoing_requests = 5

    def __init__(self, name: str, requests: int = 0, **stats: Any) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.requests, self.routing_stats = requests, stats
        self.node_id, self.availability_zone, self.multiplexed_model_ids = "node", None, set[str]()

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.requests


async def router_of(cls: Any, *replicas: Candidate, **kwargs: Any) -> Any:
    """A request router of this class, which knows ``replicas``."""
    router = cls(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=False)
    router.initialize_state(**kwargs)
    router.update_replicas(list(replicas))
    for replica in replicas:
        router.replica_queue_len_cache.update(replica.replica_id, replica.requests)
    return router


def serve_router(request_router: Any = None) -> SimpleNamespace:
    """A handle's ``_router``: ``request_router`` chooses replicas, and no autoscaling counts calls."""
    metrics = SimpleNamespace(autoscaling_config=None)
    return SimpleNamespace(
        _asyncio_router=SimpleNamespace(request_router=request_router, _metrics_manager=metrics)
    )
