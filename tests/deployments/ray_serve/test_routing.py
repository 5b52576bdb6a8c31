"""Serve's side of routing: requests get the replica that was chosen for them, and full ones cost no CPU."""

import asyncio
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.config import AutoscalingConfig

from deployments.ray_serve.hosts import FirstHostRouter
from deployments.ray_serve.routing import EncoderRouter, LanguageModelRouter, limits_here, router_here
from deployments.routing import ItemPlaces, ranked
from deployments.stages import Generation
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams
from tests.deployments.ray_serve.doubles import DEPLOYMENT, Candidate, router_of, serve_router


def request(method: str, *args, session: str = "") -> PendingRequest:
    # All calls that one HTTP request makes have its id.
    metadata = RequestMetadata(
        request_id="r", internal_request_id="r", call_method=method, session_id=session, is_streaming=False
    )
    return PendingRequest(list(args), {}, metadata)


async def chosen(router, pending: PendingRequest) -> str:
    return (await router._choose_replica_for_request(pending)).replica_id.unique_id


def item(name: str) -> PendingRequest:
    return request("encode", SimpleNamespace(hash=name), None, "salt", {})


async def test_images_of_one_request_each_get_their_own_replica():
    router = await router_of(EncoderRouter, *map(Candidate, "abc"))
    names = [f"image {number}" for number in range(40)]
    found = await asyncio.gather(*(chosen(router, item(name)) for name in names))
    assert found == [ranked(f"{name}:salt".encode(), "abc")[0] for name in names]
    assert len({*found}) == 3


async def test_by_load_alone_the_less_busy_of_two_replicas_gets_an_item():
    replicas = Candidate("a", 2), Candidate("b", 1), Candidate("c", 3)
    router = await router_of(EncoderRouter, *replicas, by_content=False)
    found = [await chosen(router, item("one")) for _ in range(300)]
    assert {*found} == {"a", "b"} and found.count("b") > found.count("a")


async def test_an_item_is_in_flight_until_its_result_is_there():
    replicas = [Candidate("a"), Candidate("b")]
    router = await router_of(EncoderRouter, *replicas)
    pending, callbacks = item("x"), []
    replica = replicas["ab".index(await chosen(router, pending))]
    result = SimpleNamespace(add_done_callback=callbacks.append)
    router.on_request_routed(pending, replica.replica_id, result)
    busy = {each.replica_id.unique_id: 99 if each is replica else 0 for each in replicas}
    places: ItemPlaces = router._places
    key = router._key(pending)
    assert places.choose(key, busy)[0] == replica.replica_id.unique_id
    callbacks[0](None)
    await asyncio.sleep(0)
    assert places.choose(key, busy)[0] != replica.replica_id.unique_id


async def test_an_item_is_encoded_by_the_line_of_the_replica_that_ray_serve_would_choose():
    router = await router_of(EncoderRouter, *map(Candidate, "abc"))
    for name in map(str, range(20)):
        wanted = ranked(f"{name}:salt".encode(), "abc")[0]
        with router.by_line(SimpleNamespace(hash=name), "salt", "abc") as found:
            assert found == wanted and router.load(router.curr_replicas[ReplicaID(wanted, DEPLOYMENT)]) == 1
            # Equal items follow it, up to what a replica may have.
            router.asked[wanted] += 3
            assert await chosen(router, item(name)) == wanted
            with ExitStack() as stack:
                enter = stack.enter_context
                assert enter(router.by_line(SimpleNamespace(hash=name), "salt", "abc")) == wanted
                assert enter(router.by_line(SimpleNamespace(hash=name), "salt", "abc")) != wanted
            # Another one goes elsewhere: this replica has more than its share.
            with router.by_line(SimpleNamespace(hash=name), "other", "abc") as other:
                assert other != wanted
            router.asked[wanted] -= 3
        assert not any(router.asked.values())
    for lines in ("", "ab"):
        with router.by_line(SimpleNamespace(hash="one"), "salt", lines) as found:
            assert found is None
    full = await router_of(EncoderRouter, Candidate("a", 5))
    with full.by_line(SimpleNamespace(hash="one"), "salt", "a") as found:
        assert found is None
    by_load = await router_of(EncoderRouter, Candidate("a", 1), Candidate("b"), by_content=False)
    for name in map(str, range(9)):
        with by_load.by_line(SimpleNamespace(hash=name), "salt", "ab") as found:
            assert found == "b"


def generation(tokens: list[int]) -> Generation:
    return Generation("one", EngineInput(tokens), SamplingParams())


async def test_a_stream_goes_to_its_embeddings_and_a_prompt_to_its_beginning():
    router = await router_of(LanguageModelRouter, *map(Candidate, "abc"))
    asked = generation(list(range(400)))
    for name in "bca":
        pending = request("generate", "id of a request that was handed over", {}, session=name)
        assert await chosen(router, pending) == name
        # The call that handed it over has chosen the replica, and said so.
        router.on_request_routed(pending, ReplicaID("x", DEPLOYMENT), None)
    held = request("hold", asked, [])
    first = await chosen(router, held)
    second = next(name for name in "abc" if name != first)
    router.on_request_routed(held, ReplicaID(second, DEPLOYMENT), None)
    assert await chosen(router, request("hold", asked, [])) == second
    assert await chosen(router, request("generate", asked, {})) == second
    assert await chosen(router, request("max_model_len")) in "abc"


async def test_what_replicas_report_counts():
    busy = Candidate("a", waiting_tokens=5000), Candidate("b", kv_usage=1.0), Candidate("c")
    router = await router_of(LanguageModelRouter, *busy)
    for start in range(9):
        assert await chosen(router, request("generate", generation([start] * 400), {})) == "c"


async def test_a_prompt_is_asked_for_by_the_line_of_the_replica_that_has_seen_its_beginning():
    router = await router_of(LanguageModelRouter, *map(Candidate, "ab"))
    prompt, longer = EngineInput(list(range(400))), EngineInput(list(range(401)))
    seen = router.by_line(prompt, "ab")
    assert seen is not None
    router.asked[seen] = 4
    assert router.by_line(longer, "ab") == seen
    # That is as many as it may have, and then the other one has no line.
    router.asked[seen] = 5
    assert router.by_line(longer, "ab") is None
    router.asked[seen] = 0
    assert router.by_line(longer, seen) is None
    by_load = await router_of(LanguageModelRouter, *map(Candidate, "ab"), by_content=False)
    by_load.asked["a"] = 1
    assert [by_load.by_line(prompt, "ab") for _ in range(4)] == ["b"] * 4


async def test_nothing_goes_past_ray_serve_while_an_autoscaling_counts_calls():
    """Whether one does may change while replicas run, by ``deployments`` of Serve's configuration."""
    router = await router_of(LanguageModelRouter, Candidate("a"))
    handle: Any = SimpleNamespace(_router=serve_router(router))
    serving = handle._router._asyncio_router
    assert router_here(handle, LanguageModelRouter) is router and limits_here(handle) == {"a": 5}
    assert router_here(handle, EncoderRouter) is None
    serving._metrics_manager.autoscaling_config = AutoscalingConfig()
    assert router_here(handle, LanguageModelRouter) is None and limits_here(handle) == {}
    serving._metrics_manager.autoscaling_config = None
    assert router_here(handle, LanguageModelRouter) is router
    # Of a language model over several hosts, the first one alone may be asked.
    serving.request_router = await router_of(FirstHostRouter, Candidate("a"))
    assert router_here(handle, LanguageModelRouter) is None


@pytest.mark.parametrize(
    ("cls", "pending"),
    [
        (EncoderRouter, lambda: item("x")),
        (LanguageModelRouter, lambda: request("generate", "id", {}, session="a")),
        (LanguageModelRouter, lambda: request("generate", generation([1] * 99), {})),
    ],
)
async def test_a_router_of_full_replicas_waits_without_spinning(cls, pending):
    full = [Candidate(name, 5) for name in "ab"]
    router = await router_of(cls, *full)
    rounds, pauses = 0, []
    choose = router.choose_replicas

    async def counted(*args, **kwargs):
        nonlocal rounds
        rounds += 1
        if rounds == 6:
            for replica in full:
                replica.requests = 0
        return await choose(*args, **kwargs)

    async def pause(attempt: int) -> None:
        pauses.append(attempt)

    router.choose_replicas, router._backoff = counted, pause
    assert await asyncio.wait_for(chosen(router, pending()), 60) in "ab"
    # The second try comes at once, and each further one after a longer pause.
    assert rounds == 6 and pauses == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("cls", "pending"),
    [
        (EncoderRouter, item),
        (LanguageModelRouter, lambda name: request("hold", generation([ord(name)] * 99))),
    ],
)
async def test_what_is_full_by_lines_gets_nothing_by_ray_serve(cls, pending):
    """Ray Serve doesn't count what goes past it, and would fill each replica once more."""
    router = await router_of(cls, *map(Candidate, "ab"))
    router.asked.update(a=5)
    assert {await chosen(router, pending(str(number))) for number in range(9)} == {"b"}
    router.asked.update(b=5)
    pauses = []

    async def pause(attempt: int) -> None:
        pauses.append(attempt)
        router.asked.update(a=-attempt)

    router._backoff = pause
    assert await asyncio.wait_for(chosen(router, pending("x")), 60) == "a" and pauses == [0, 1]


@pytest.mark.parametrize(
    ("cls", "pending", "by_line"),
    [
        (
            EncoderRouter,
            lambda: item("x"),
            lambda router: router.by_line(SimpleNamespace(hash="x"), "salt", "a"),
        ),
        (
            LanguageModelRouter,
            lambda: request("hold", generation([1] * 99)),
            lambda router: nullcontext(router.by_line(EngineInput([1] * 99), "a")),
        ),
    ],
)
async def test_newcomers_by_lines_do_not_take_the_places_of_those_that_wait(cls, pending, by_line):
    router = await router_of(cls, Candidate("a"))
    router.asked.update(a=5)
    taken = []

    async def pause(attempt: int) -> None:
        # A place is free, and a newcomer is there before Ray Serve asks again.
        router.asked.update(a=-1)
        with by_line(router) as name:
            taken.append(name)

    router._backoff = pause
    assert await asyncio.wait_for(chosen(router, pending()), 60) == "a" and set(taken) == {None}
    with by_line(router) as name:
        assert name == "a"


async def test_what_a_replica_holds_goes_there_though_it_is_full_by_lines():
    router = await router_of(LanguageModelRouter, *map(Candidate, "ab"))
    router.asked.update(a=5)
    assert await chosen(router, request("generate", "id", {}, session="a")) == "a"


async def test_a_dead_replica_s_session_goes_elsewhere():
    router = await router_of(LanguageModelRouter, Candidate("a"))
    assert await chosen(router, request("generate", "id", {}, session="gone")) == "a"
