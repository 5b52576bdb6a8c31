"""The list of models, and their health."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from deployments.api import create_api
from deployments.config import AppConfig, IngressConfig
from deployments.pipeline import Pipeline
from deployments.stages import Stages
from tests.deployments.asgi import AppTransport
from tests.serving import app_args


async def test_models_and_health(http, client):
    assert [model.id async for model in client.models.list()] == ["pocket", "tests/vectors"]
    assert (await client.models.retrieve("pocket")).max_model_len == 1024
    assert (await client.models.retrieve("tests/vectors")).max_model_len == 512
    cards = (await http.get("/v1/models")).json()["data"]
    assert [(card["root"], card["parent"]) for card in cards] == [("pocket", None), ("tests/vectors", None)]
    health = await http.get("/health")
    assert health.json() == {"status": "ok", "models": {"pocket": "ok", "tests/vectors": "ok"}}


@pytest.mark.parametrize("sleeps", [False, True])
async def test_models_that_do_not_answer_are_listed(pipeline_spec, sleeps):
    class Hanging:
        calls = 0

        async def max_model_len(self):
            self.calls += 1
            await asyncio.Future()

    stage: Any = Hanging()
    scale = {"autoscaling": {"min_replicas": 0}} if sleeps else {}
    changed = pipeline_spec.language_model.model_copy(update=scale)
    spec = pipeline_spec.model_copy(update={"language_model": changed})
    served = Pipeline(spec, Stages(stage), ThreadPoolExecutor(1))
    api = create_api(IngressConfig(health_timeout_s=0.01), {"pocket": served, "again": served})
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60) as http:
        cards = (await http.get("/v1/models")).json()["data"]
        assert [(card["id"], card["max_model_len"]) for card in cards] == [("pocket", None)] * 2
        assert (await http.get("/v1/models/pocket")).status_code == 200
    # One that sleeps isn't woken for that.
    assert bool(stage.calls) is not sleeps


@pytest.fixture
def pipeline_spec():
    return AppConfig.model_validate(app_args()).models[0]


@pytest.mark.parametrize("named", [{}, {"model": None}, {"model": ""}], ids=["absent", "null", "empty"])
async def test_a_model_need_not_be_named_where_one_alone_can_answer(http, running, named, monkeypatch):
    chat = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2, **named}
    assert (await http.post("/v1/chat/completions", json=chat)).json()["model"] == "pocket"
    vectors = {"input": "a", **named}
    assert (await http.post("/v1/embeddings", json=vectors)).json()["model"] == "tests/vectors"
    pair = {"query": "a", "documents": ["b"], **named}
    assert (await http.post("/v1/rerank", json=pair)).json()["model"] == "tests/vectors"
    state = running.app.api.state
    several = {**state.pipelines, "another": state.pipelines["pocket"]}
    monkeypatch.setattr(state, "pipelines", several)
    refused = await http.post("/v1/chat/completions", json=chat)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "model")
    assert error["message"] == "model is missing; served here: 'pocket', 'tests/vectors', 'another'."
    # The only one is asked, also if it makes vectors.
    monkeypatch.setattr(state, "pipelines", {"tests/vectors": several["tests/vectors"]})
    refused = await http.post("/v1/chat/completions", json=chat)
    assert refused.status_code == 400 and "makes embeddings" in refused.json()["error"]["message"]
