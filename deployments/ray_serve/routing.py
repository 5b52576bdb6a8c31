"""Chooses the replica of a language model that gets a request."""

import random

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import FIFOMixin, RequestRouter


class SessionRouter(FIFOMixin, RequestRouter):
    """Sends a request whose session is a replica's id to that replica, any other to the less busy of two.

    This is best effort. Serve may give the chosen replica to an older request that waits, and requests for a
    dead replica go to others. A replica that gets a wrong request answers with a ``Misrouted`` refusal.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            # Without this Serve asks again at once, over and over, while all replicas are busy.
            pending_request.routing_context.should_backoff = True
        session = pending_request.metadata.session_id if pending_request is not None else ""
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == session]
        return [named or random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
