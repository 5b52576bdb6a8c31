"""A language model whose ranks are spread over hosts: a gang of replicas, one for each host.

Serve starts the replicas of a gang together or not at all, and when one dies it replaces all of them. The
first one holds the engine and rank 0; it alone gets requests. The others only start the ranks of their hosts.
"""

import json
import time
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from deployments.in_place import InPlace
from deployments.metrics.families import Part
from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.refusals import Misrouted, Refusal
from deployments.ray_serve.replicas import LanguageModelReplica, leave
from deployments.ray_serve.routing import LanguageModelRouter
from deployments.stage_config import LanguageModelConfig
from deployments.tracing import TracingConfig
from engine.config import EngineConfig
from engine.errors import Unavailable
from engine.executor.hosts import HostRanks, HostsLauncher, Rendezvous

#: Seconds that the other hosts wait for rank 0 to publish where it listens.
_RENDEZVOUS_S = 300.0


class HostReplica(LanguageModelReplica):
    """One host of a language model.

    Args:
        tracing: where spans go.
        config: of the stage, with the number of hosts.
        engine: the model and how to run it; ``tensor_parallel_size`` ranks over all hosts.
    """

    def __init__(
        self, tracing: TracingConfig | None, config: LanguageModelConfig, engine: EngineConfig
    ) -> None:
        hosts = config.hosts
        gang = serve.get_replica_context().gang_context
        assert gang is not None and gang.world_size == hosts
        self._host = gang.rank
        notice = _Notice(gang.gang_id)
        if self._host == 0:
            address = ray.util.get_node_ip_address()
            launcher = HostsLauncher(address, hosts, notice.publish, notice.retract)
            super().__init__(tracing, config, engine, launcher=launcher)
            return
        prepare_process()
        self._in_place = InPlace(config, config.IN_PLACE, lambda _: None)
        here = engine.tensor_parallel_size // hosts
        # Without its ranks this host is of no use, and Serve must know at once.
        self._ranks = HostRanks(notice.wait(), self._host, here, leave)

    def record_replica_metadata(self) -> dict[str, int]:
        """Return what :class:`FirstHostRouter` knows of this replica."""
        return {"host": self._host}

    async def max_model_len(self) -> int | Refusal:
        """As its base; a host without the engine refuses."""
        if self._host == 0:
            return await super().max_model_len()
        return Refusal(Misrouted("The first host of a language model alone answers."))

    async def measured(self) -> Part:
        """The metrics of this replica; a host without the engine has none."""
        if self._host == 0:
            return await super().measured()
        return Part({"replica": serve.get_replica_context().replica_id.unique_id}, [])

    async def record_routing_stats(self) -> dict[str, float]:
        """As its base; a host without the engine has nothing to do by itself."""
        return await super().record_routing_stats() if self._host == 0 else {}

    async def is_idle(self) -> bool:
        """Return whether this replica holds no data of any request."""
        return self._host > 0 or await super().is_idle()

    async def check_health(self) -> None:
        """Ray Serve replaces the gang of a replica that raises here."""
        if self._host == 0:
            await super().check_health()
        elif not self._ranks.alive:
            raise Unavailable("A rank of this host has ended.")

    async def __del__(self) -> None:
        if hasattr(self, "_ranks"):
            self._ranks.stop()
        elif hasattr(self, "_stage"):
            self._stage.close()


class FirstHostRouter(LanguageModelRouter):
    """As its base, among the replicas that hold an engine."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        firsts = [replica for replica in candidate_replicas if replica.replica_metadata.get("host") == 0]
        if firsts:
            return await super().choose_replicas(firsts, pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return []


class _Notice:
    """The rendezvous of one gang, in the store of Ray's head: only the cluster's own processes read there.

    Args:
        gang: its id, which is new for each start.
    """

    def __init__(self, gang: str) -> None:
        self._key = f"sightline/hosts/{gang}".encode()

    def publish(self, rendezvous: Rendezvous) -> None:
        fields: dict[str, Any] = {
            "host": rendezvous.host,
            "port": rendezvous.port,
            "key": rendezvous.key.hex(),
        }
        _internal_kv_put(self._key, json.dumps(fields).encode())

    def retract(self) -> None:
        _internal_kv_del(self._key)

    def wait(self) -> Rendezvous:
        """Return the rendezvous, once it is published.

        Raises:
            Unavailable: it isn't published in time.
        """
        deadline = time.monotonic() + _RENDEZVOUS_S
        while (found := _internal_kv_get(self._key)) is None:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"The first host of the language model did not start in {_RENDEZVOUS_S:.0f} s."
                )
            time.sleep(0.1)
        fields = json.loads(found)
        return Rendezvous(fields["host"], fields["port"], bytes.fromhex(fields["key"]))
