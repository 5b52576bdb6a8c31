"""Which replica of a language model a request goes to."""

import random

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import FIFOMixin, RequestRouter


class SessionRouter(FIFOMixin, RequestRouter):
    """A request whose session is a replica's id goes to that replica; any other to the less busy of two.

    Nearly always: of requests that wait at the same time Serve gives the replica found for one to the one
    that came first. And where a session's replica is gone, others take its requests. Either way the replica
    says so.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        session = pending_request.metadata.session_id if pending_request is not None else ""
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == session]
        return [named or random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
