"""Ray Serve's routers of encoders and language models: they ask the policies of :mod:`deployments.routing`.

``choose_replica`` and ``dispatch`` of Serve's handles are not used: they reserve a place by one more call of
the replica, and one choice carries one call, while embeddings and the stream that follows are two.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

from deployments.routing import ItemPlaces, Load, PromptPlaces, prompt_keys
from deployments.stages import Generation, Pooling
from engine.prompt import EngineInput, MediaItem

R = TypeVar("R", bound="_ExactRouter")


class _ExactRouter(RequestRouter):
    """Gives each request the replica that was chosen for it.

    Serve's own router finds the waiting request by the id of the HTTP request, which all calls of one HTTP
    request share: images of one request would swap their replicas. Its FIFO mixin gives a replica to the
    request that waits longest.

    Attributes:
        asked: requests of this process that each replica was asked by its line, and has not answered yet.
    """

    def initialize_state(self, by_content: bool = True, **_: Any) -> None:
        self._by_content = by_content
        self.asked: Counter[str] = Counter()

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                self._cancel_routing_task_for_pending_request(pending)
                self._record_queue_wait_time(pending)
                pending.future.set_result(replica)
                self._remove_pending_request_from_indices(pending)
                return

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order: Iterable[str] = by_name
        if pending_request is not None:
            # Without this Serve asks again at once, for as long as every replica is full.
            pending_request.routing_context.should_backoff = True
            # Ray Serve doesn't count what was asked by lines: it would fill a full replica once more. What
            # has a session has its place already.
            session = pending_request.metadata.session_id
            order = [
                name
                for name in self.order(by_name, pending_request)
                if name == session or self.asked[name] < by_name[name].max_ongoing_requests
            ]
        return [[by_name[name]] for name in order]

    def order(self, replicas: dict[str, RunningReplica], request: PendingRequest) -> Iterable[str]:
        """The names of ``replicas`` to ask for the request, best first."""
        raise NotImplementedError

    def load(self, replica: RunningReplica) -> int:
        """Requests at a replica, as far as this process knows."""
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return known + self.asked[replica.replica_id.unique_id]

    def has_room(self, replica: RunningReplica) -> bool:
        """Return whether a replica has fewer requests than it may have."""
        return self.load(replica) < replica.max_ongoing_requests

    def with_lines(self, lines: Container[str]) -> dict[str, RunningReplica]:
        """The replicas by their names; none if Ray Serve is to choose: while one has no line yet, and while
        calls of Ray Serve wait for a place. Newcomers by lines would take each place before it asks again.

        Args:
            lines: names of the replicas to which one is open.
        """
        if self.num_routing_tasks_in_backoff:
            return {}
        replicas = {replica.replica_id.unique_id: replica for replica in self.curr_replicas.values()}
        return {} if any(name not in lines for name in replicas) else replicas

    def by_load(self, replicas: dict[str, RunningReplica]) -> list[str]:
        """The less busy of two random replicas, then the others: what Serve's own router does. Several
        ingress replicas that all chose the least busy one would fill it together."""
        order = random.sample(list(replicas), len(replicas))
        return sorted(order[:2], key=lambda name: self.load(replicas[name])) + order[2:]


class EncoderRouter(_ExactRouter):
    """Sends an item to the replica that :class:`~deployments.routing.ItemPlaces` chooses for its content."""

    def initialize_state(self, by_content: bool = True, **_: Any) -> None:
        super().initialize_state(by_content)
        self._places = ItemPlaces()

    @contextmanager
    def by_line(self, item: MediaItem, salt: str, lines: Container[str]) -> Iterator[str | None]:
        """The replica that is to encode an item within the block, asked by its line. None if Ray Serve is to
        choose: a replica has no line yet, or all have as many requests as they may have.

        Args:
            lines: as of :meth:`with_lines`.
        """
        replicas = self.with_lines(lines)
        key = _item_key(item, salt) if self._by_content else None
        order = self._ranked(replicas, key) if replicas else ()
        name = next((each for each in order if self.has_room(replicas[each])), None)
        if name is None:
            yield None
            return
        self.asked[name] += 1
        if key is not None:
            self._places.sent(key, name)
        try:
            yield name
        finally:
            self.asked[name] -= 1
            if key is not None:
                self._places.ended(key, name)

    def order(self, replicas: dict[str, RunningReplica], request: PendingRequest) -> Iterable[str]:
        return self._ranked(replicas, self._key(request))

    def _ranked(self, replicas: dict[str, RunningReplica], key: bytes | None) -> list[str]:
        """The names of ``replicas`` for an item with this key, best first; by load if it is None."""
        if key is None:
            return self.by_load(replicas)
        return self._places.choose(key, {name: self.load(replica) for name, replica in replicas.items()})

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        key, name = self._key(pending_request), replica_id.unique_id
        if key is not None:
            self._places.sent(key, name)
            loop = self._event_loop
            # Results end on a thread of Ray's.
            result.add_done_callback(lambda _: loop.call_soon_threadsafe(self._places.ended, key, name))

    def _key(self, request: PendingRequest) -> bytes | None:
        """The key of the item in a call of ``VisionEncoderReplica.encode``."""
        if not self._by_content or request.metadata.call_method != "encode":
            return None
        item, _, salt, *_ = request.args
        return _item_key(item, salt)


def _item_key(item: MediaItem, salt: str) -> bytes:
    return f"{item.hash}:{salt}".encode()[:64]


class LanguageModelRouter(_ExactRouter):
    """Sends a request whose session is a replica's id to that replica, and any other to the replica that
    :class:`~deployments.routing.PromptPlaces` chooses for its prompt.

    Requests for a replica that has gone are sent elsewhere; it answers them with a ``Misrouted`` refusal.
    """

    def initialize_state(self, by_content: bool = True, **_: Any) -> None:
        super().initialize_state(by_content)
        self._places = PromptPlaces()

    def by_line(self, inputs: EngineInput, lines: Container[str]) -> str | None:
        """The replica that is to be asked for the answer to a prompt by its line. None if Ray Serve is to
        choose: a replica has no line yet, or as many requests as it may have.

        Args:
            lines: as of :meth:`with_lines`.
        """
        if not (replicas := self.with_lines(lines)):
            return None
        name, *others = replicas
        if others:
            keys = prompt_keys(inputs) if self._by_content else None
            name = self._ranked(replicas, keys, len(inputs.token_ids))[0]
            if keys is not None:
                self._places.sent(keys, name)
        return name if self.has_room(replicas[name]) else None

    def order(self, replicas: dict[str, RunningReplica], request: PendingRequest) -> Iterable[str]:
        session = request.metadata.session_id
        if session in replicas:
            return [session]
        return self._ranked(replicas, *(self._prompt(request) or (None, 0)))

    def _ranked(
        self, replicas: dict[str, RunningReplica], keys: list[bytes] | None, tokens: int
    ) -> list[str]:
        """The names of ``replicas`` for a prompt with these keys, best first; by load if they are None."""
        if keys is None:
            return self.by_load(replicas)
        self._places.keep(list(replicas))
        loads = {name: self._load(replica) for name, replica in replicas.items()}
        return self._places.choose(keys, tokens, loads)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        prompt = self._prompt(pending_request)
        if prompt is not None and not pending_request.metadata.session_id:
            self._places.sent(prompt[0], replica_id.unique_id)

    def _load(self, replica: RunningReplica) -> Load:
        stats = replica.routing_stats or {}
        return Load(self.load(replica), stats.get("waiting_tokens", 0), stats.get("kv_usage", 0.0))

    def _prompt(self, request: PendingRequest) -> tuple[list[bytes], int] | None:
        """Keys and length of the prompt in a call of ``hold``, ``generate`` or ``embed``; None in others, and
        where the replica has the prompt already."""
        if not self._by_content or request.metadata.call_method not in ("hold", "generate", "embed"):
            return None
        given = request.args[0]
        if not isinstance(given, Generation | Pooling):
            return None
        return prompt_keys(given.inputs), len(given.inputs.token_ids)


def router_here(handle: DeploymentHandle, kind: type[R]) -> R | None:
    """The router of a handle, if it is of this kind, and calls may go past Ray Serve: it runs on this event
    loop and knows the replicas, and nothing counts the calls. A language model over several hosts has another
    kind."""
    router = _any_router_here(handle)
    # By its name: Ray Serve pickles the class by value, so each process has one of its own.
    return router if type(router).__name__ == kind.__name__ else None


def limits_here(handle: DeploymentHandle) -> dict[str, int]:
    """The most requests of each replica, by its name; none if calls may not go past Ray Serve, as in
    :func:`router_here`."""
    router = _any_router_here(handle)
    replicas = [] if router is None else router.curr_replicas.values()
    return {replica.replica_id.unique_id: replica.max_ongoing_requests for replica in replicas}


def _any_router_here(handle: DeploymentHandle) -> Any:
    serving: Any = getattr(getattr(handle, "_router", None), "_asyncio_router", None)
    router = getattr(serving, "request_router", None)
    if getattr(router, "_event_loop", None) is not asyncio.get_running_loop():
        return None
    # As it is now: an autoscaling may come while replicas run. It counts the calls that Ray Serve knows of.
    return router if serving._metrics_manager.autoscaling_config is None else None
