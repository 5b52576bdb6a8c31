"""``/metrics`` of the application in one process."""

import re
from dataclasses import replace

import httpx
import openai
import pytest

from deployments.api import create_api
from deployments.config import AppConfig, ReplayConfig
from deployments.metrics.families import Family, Part
from tests.deployments.asgi import AppTransport
from tests.deployments.dying import Deaths, dying_client
from tests.deployments.pictures import ask, circle, square
from tests.metrics import Values
from tests.serving import ROOT, app_args

PAGE = (ROOT / "docs" / "metrics.md").read_text()

STAGES = ("preprocessor", "encoder", "language_model")

#: Units of Prometheus, and what has none: counts of things.
UNITS = ("_seconds", "_bytes", "_ratio")


@pytest.fixture
def scrape(http):
    async def scrape() -> Values:
        response = await http.get("/metrics")
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
        return Values(response.text)

    return scrape


async def test_the_page_lists_what_is_exported(scrape):
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", PAGE, re.MULTILINE)
    }
    # Names within texts and in the table for other servers' dashboards.
    assert set(re.findall(r"`(sightline_\w+)`", PAGE)) <= listed.keys()
    exported = {}
    # The second scrape counts the first.
    await scrape()
    for family in (await scrape()).families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels}
        exported[name] = family.type, labels - {"model", "stage", "replica", "le"}
        assert family.documentation.endswith(".")
    stages = ("call_duration_seconds", "lost_total", "open_calls")
    own_stage = {f"sightline_stage_{name}" for name in stages}
    for name, (kind, labels) in listed.items():
        assert exported.pop(name) == (kind, labels - ({"stage"} if name in own_stage else set())), name
    assert exported == {}


async def test_names_have_units(scrape):
    for family in (await scrape()).families:
        assert re.fullmatch(r"sightline_[a-z_]+", family.name)
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_batch_size"))
        if re.search("time|duration|busy|rest", family.name):
            assert family.name.endswith(UNITS)


async def test_a_chat_is_counted_by_every_stage(scrape, client, running, idle_afterwards):
    # The first request also asks the language model for the context's length.
    await client.chat.completions.create(model="pocket", messages=ask("hi"), max_tokens=1)
    before = await scrape()
    asked = {
        "model": "pocket",
        "messages": ask("Do both pictures show the same color?", circle("red", (171, 93)), square("blue")),
        "max_tokens": 5,
        "extra_body": {"ignore_eos": True},
    }
    whole = await client.chat.completions.create(**asked)
    async for _ in await client.chat.completions.create(**asked, stream=True):
        pass
    after = await scrape()

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    pocket = {"model": "pocket"}
    assert grown("http_requests_total", route="/v1/chat/completions", code="200") == 2
    assert grown("http_request_duration_seconds_count", route="/v1/chat/completions") == 2
    assert grown("http_received_bytes_total") > 1000 and grown("http_sent_bytes_total") > 500
    assert grown("answers_total", outcome="ok", **pocket) == 2
    assert grown("answer_duration_seconds_count", **pocket) == 2
    assert grown("time_to_first_token_seconds_count", **pocket) == 2
    first, whole_time = "time_to_first_token_seconds_sum", "answer_duration_seconds_sum"
    assert 0 < grown(first, **pocket) <= grown(whole_time, **pocket)
    # The first token of an answer has none before it, and tokens that come together share a gap.
    assert 0 < grown("time_between_tokens_seconds_count", **pocket) <= 8
    assert grown("completion_tokens_total", **pocket) == 10
    assert grown("prompt_tokens_total", **pocket) == 2 * whole.usage.prompt_tokens
    assert grown("engine_prompt_tokens_total", **pocket) == 2 * whole.usage.prompt_tokens
    assert grown("cached_tokens_total", **pocket) == grown("engine_cached_tokens_total", **pocket) > 0
    for stage in STAGES:
        labels = {"stage": stage, **pocket}
        requests = 4 if stage == "encoder" else 2
        assert grown("stage_requests_total", outcome="ok", **labels) == requests, stage
        assert grown("stage_request_duration_seconds_count", **labels) == requests
        assert grown("stage_call_duration_seconds_count", **labels) == 2
        assert grown("stage_received_bytes_total", **labels) > 0
        assert grown("stage_batch_size_count", **labels) > 0
        assert after("stage_running_requests", **labels) == after("stage_queue_length", **labels) == 0
        assert after("stage_replicas", **labels) == 1
    assert grown("preprocessor_pixels_total", **pocket) == 2 * (171 * 93 + 200 * 160)
    assert after("preprocessor_pending_pixels", **pocket) == 0
    hits, misses = (grown(f"preprocessor_cache_{name}_total", **pocket) for name in ("hits", "misses"))
    assert hits >= 2 and hits + misses == 4
    assert after("preprocessor_cached_items", **pocket) >= 2
    assert after("preprocessor_cached_bytes", **pocket) > 0
    assert grown("encoder_items_total", **pocket) + grown("encoder_cache_hits_total", **pocket) == 4
    assert grown("encoder_cache_hits_total", **pocket) >= 2
    assert after("encoder_pending_visual_tokens", **pocket) == 0
    assert grown("engine_requests_finished_total", **pocket) == 2
    assert after("engine_kv_usage_ratio", **pocket) == 0 < after("engine_kv_blocks_cached", **pocket)


async def test_what_runs_is_seen_while_it_runs_and_a_client_that_leaves_is_counted(
    scrape, client, idle_afterwards
):
    before = await scrape()
    stream = await client.chat.completions.create(
        model="pocket",
        messages=ask("What shape is this?", square("blue")),
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    await anext(aiter(stream))
    during = await scrape()
    assert during("open_answers", model="pocket") == during("engine_running_requests", model="pocket") == 1
    assert during("stage_running_requests", model="pocket", stage="language_model") == 1
    assert during("engine_kv_usage_ratio", model="pocket") > 0
    # This scrape is open itself.
    assert during("http_open_requests") == 2
    await stream.close()

    after = await scrape()
    assert after("answers_total", outcome="ok") == before("answers_total", outcome="ok")
    assert after("answers_total", outcome="cancelled") == before("answers_total", outcome="cancelled") + 1
    assert after("open_answers") == 0


async def test_refusals_and_unknown_paths_are_counted_without_a_client_s_text(scrape, client, http):
    before = await scrape()
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model="pocket", messages=ask("What?"), extra_body={"logit_bias": {"99999": 1}}
        )
    await http.get("/v1/responses/resp_nothing")
    await http.get("/secret-path")
    await http.get("/health/")
    after = await scrape()

    def grown(**labels: str) -> float:
        return after("http_requests_total", **labels) - before("http_requests_total", **labels)

    assert grown(route="/v1/chat/completions", code="400") == 1
    assert grown(route="/v1/responses/{name}", code="404") == 1
    assert grown(route="other", code="404") == 1
    assert grown(route="/health", code="200") == 1
    refused = {"outcome": "refused", "model": "pocket"}
    assert after("answers_total", **refused) - before("answers_total", **refused) == 1
    assert not any(
        "secret" in value or "nothing" in value
        for family in after.families
        for sample in family.samples
        for value in sample.labels.values()
    )


async def test_losses_of_each_stage_and_what_is_carried_on_are_counted(running):
    deaths = Deaths([("prepare", 1), ("encode", 0), ("rows", 0), ("update", 1)])
    config = AppConfig.model_validate(app_args())
    async with dying_client("pocket", config, running.pocket.stages, deaths, ReplayConfig()) as http:
        body = {"model": "pocket", "messages": ask("What shape is this?", square("red")), "max_tokens": 9}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        found = Values((await http.get("/metrics")).text)
    assert not deaths.planted
    lost = {stage: found("stage_lost_total", stage=stage) for stage in STAGES}
    assert lost == {"preprocessor": 1, "encoder": 1, "language_model": 2}
    assert found("failovers_total", work="prepare") == found("failovers_total", work="answer") == 2
    assert found("answers_total", outcome="ok") == 1


async def test_replicas_of_the_ingress_and_stages_are_put_together(running):
    """The other replica of the ingress is played, and a stage that doesn't answer is left out."""
    there = [Part({"replica": name}, [Family.of("sightline_x_total", "counter", "X.", 1)]) for name in "ab"]

    async def ingress() -> list[Part]:
        return there

    class Stuck:
        task = "generate"

        def measured(self):
            found = running.app.api.state.pipelines["pocket"].measured()

            async def dead() -> list[Part]:
                raise ConnectionError("gone")

            return replace(found, stages=found.stages | {"encoder": dead}, may_sleep={"encoder"})

    api = create_api(running.app.api.state.config, {"pocket": Stuck()}, replica="a", ingress=ingress)
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test") as http:
        found = Values((await http.get("/metrics")).text)
    assert found("x_total") == 2 and found("x_total", replica="b") == 1
    assert found("stage_replicas", stage="encoder") == 0
    assert found("stage_replicas", stage="preprocessor") == 1
    assert [found("stage_may_sleep", stage=stage) for stage in STAGES] == [0, 1, 0]
