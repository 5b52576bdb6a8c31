"""The choice of a language model's replica."""

import asyncio
from types import SimpleNamespace

from deployments.ray_serve.routing import SessionRouter


def replicas(*names):
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]


def chosen(session, among):
    router = object.__new__(SessionRouter)
    context = SimpleNamespace(should_backoff=False)
    request = SimpleNamespace(metadata=SimpleNamespace(session_id=session), routing_context=context)
    (found,) = asyncio.run(router.choose_replicas(among, request))
    assert context.should_backoff, "Serve would ask again without a pause"
    return {replica.replica_id.unique_id for replica in found}


def test_a_session_s_replica_is_the_only_choice():
    among = replicas("a", "b", "c")
    assert chosen("b", among) == {"b"}
    assert all(len(chosen(session, among)) == 2 for session in ("", "gone"))
    assert chosen("gone", replicas("a")) == {"a"}
