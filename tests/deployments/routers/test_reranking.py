"""Embedding models and rerankers over HTTP, against Transformers."""

import base64
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from deployments.routers import scoring
from tests.deployments.asgi import AppTransport
from tests.deployments.routers.test_cache_salt import noted_salts
from tests.engine import retrieval, tiny
from tests.engine.families.colqwen2 import ColQwen2Reference, make_colqwen2
from tests.serving import wait_until

RED, BLUE = tiny.picture(60, 44, 1), tiny.picture(40, 72, 2)
QUERY = "what is shown?"
DOCUMENTS = ("a red square", RED, (BLUE, "a lazy dog"))
OWN = "Represent the user's input."


@dataclass(frozen=True)
class Retrieving:
    """An embedding model, a reranker of the same checkpoint, and one of vectors for each token; and what
    Transformers makes of their inputs."""

    http: httpx.AsyncClient
    reference: retrieval.Qwen3VLReference
    pages: ColQwen2Reference

    async def post(self, path: str, model: str = "vectors", **body):
        response = await self.http.post(path, json={"model": model, **body})
        return response.status_code, response.json()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tmp_path_factory) -> AsyncIterator[Retrieving]:
    path = retrieval.make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))
    pages = make_colqwen2(tmp_path_factory.mktemp("colqwen2"), hub=False)
    engine = {"model": str(path), "max_model_len": 512, "kv_cache_bytes": 8 << 20}
    models = [
        {"name": "vectors", "engine": {**engine, "task": "embed", "instruction": ""}},
        {"name": "scores", "engine": {**engine, "task": "score"}},
        {"name": "pages", "engine": {**engine, "model": str(pages), "task": "embed"}},
    ]
    app = LocalApplication(AppConfig.model_validate({"models": models}))
    transport = AppTransport(app.api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
        yield Retrieving(http, retrieval.Qwen3VLReference(path), ColQwen2Reference(pages))
    for model in app.models.values():
        await wait_until(model.language_model.is_idle)
    await app.close()


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def wire(shown):
    """As a client sends what the reference is shown."""
    if isinstance(shown, str):
        return shown
    image, text = shown if isinstance(shown, tuple) else (shown, None)
    return {"image": url(image)} | ({"text": text} if text else {})


async def test_embeddings_follow_the_instruction(served):
    for body, written in (({}, OWN), ({"instruction": "Find it"}, "Find it.")):
        status, made = await served.post("/v1/embeddings", input=[QUERY, DOCUMENTS[0]], **body)
        assert status == 200, made
        for text, entry in zip((QUERY, DOCUMENTS[0]), made["data"], strict=True):
            np.testing.assert_allclose(entry["embedding"], served.reference.embed(text, written), atol=5e-5)
    content = [{"type": "image_url", "image_url": {"url": url(RED)}}]
    messages = [{"role": "user", "content": content}]
    _, made = await served.post("/v1/embeddings", messages=messages, dimensions=16)
    cut = served.reference.embed(RED, OWN)[:16]
    np.testing.assert_allclose(made["data"][0]["embedding"], cut / cut.norm(), atol=5e-5)


async def test_scores_of_vectors_are_cosines(served):
    body = {"text_1": QUERY, "text_2": [wire(document) for document in DOCUMENTS]}
    status, made = await served.post("/v1/score", instruction="Find it.", **body)
    assert status == 200, made
    query = served.reference.embed(QUERY, "Find it.")
    expected = [query @ served.reference.embed(document, OWN) for document in DOCUMENTS]
    np.testing.assert_allclose([entry["score"] for entry in made["data"]], expected, atol=1e-4)


async def test_an_item_on_both_sides_has_a_vector_with_the_instruction_and_one_without(served):
    body = {"text_1": [QUERY, "a red square"], "text_2": ["a red square", QUERY], "instruction": "Find it."}
    _, made = await served.post("/v1/score", **body)
    embed = served.reference.embed
    expected = [
        embed(one, "Find it.") @ embed(other, OWN)
        for one, other in zip(body["text_1"], body["text_2"], strict=True)
    ]
    assert abs(expected[0] - expected[1]) > 1e-3
    np.testing.assert_allclose([entry["score"] for entry in made["data"]], expected, atol=1e-4)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/rerank"])
@pytest.mark.parametrize("instruction", [None, "Is it the same colour?"])
async def test_a_reranker_reads_both_together(served, path, instruction):
    documents = [wire(document) for document in DOCUMENTS]
    fields = ("query", "documents") if "rerank" in path else ("text_1", "text_2")
    body = dict(zip(fields, (wire((RED, QUERY)), documents), strict=True))
    status, made = await served.post(path, "scores", instruction=instruction, **body)
    assert status == 200, made
    written = instruction or "Given a search query, retrieve relevant candidates that answer the query."
    expected = [served.reference.score((RED, QUERY), document, written) for document in DOCUMENTS]
    if "rerank" in path:
        assert [entry["index"] for entry in made["results"]] == np.argsort(np.negative(expected)).tolist()
        found = {entry["index"]: entry["relevance_score"] for entry in made["results"]}
        found = [found[index] for index in range(len(documents))]
    else:
        found = [entry["score"] for entry in made["data"]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


async def test_a_salt_goes_with_every_pair(served, monkeypatch):
    found = noted_salts(monkeypatch)
    body = {"query": QUERY, "documents": [wire(RED), "a text"], "cache_salt": "tenant"}
    status, made = await served.post("/v1/rerank", "scores", **body)
    assert status == 200, made
    assert found == [("tenant", "tenant")] * 2


async def test_too_many_vectors_are_refused(served, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_NUMBERS", 1000)
    documents = [wire(RED), wire(BLUE)]
    status, made = await served.post("/v1/rerank", "pages", query=QUERY, documents=documents)
    assert status == 400 and made["error"]["param"] in ("query", "documents[0]", "documents[1]"), made


async def test_a_model_without_instructions_takes_none(served):
    for path, body in (("/pooling", {"input": QUERY}), ("/v1/score", {"text_1": QUERY, "text_2": QUERY})):
        status, made = await served.post(path, "pages", instruction="Find it.", **body)
        assert status == 400 and made["error"]["param"] == "instruction", made


async def test_vectors_of_tokens_and_their_scores(served):
    content = [{"type": "image_url", "image_url": {"url": url(RED)}}]
    _, query = await served.post("/pooling", "pages", input=[QUERY])
    _, page = await served.post("/pooling", "pages", messages=[{"role": "user", "content": content}])
    expected = served.pages.query(QUERY), served.pages.document(RED)
    for made, vectors in zip((query, page), expected, strict=True):
        np.testing.assert_allclose(made["data"][0]["data"], vectors, atol=5e-5)
    documents = [wire(RED), wire(BLUE)]
    status, made = await served.post("/v1/rerank", "pages", query=QUERY, documents=documents)
    assert status == 200, made
    (scores,) = served.pages.score(expected[:1], [expected[1], served.pages.document(BLUE)])
    assert [entry["index"] for entry in made["results"]] == scores.argsort(descending=True).tolist()
    found = {entry["index"]: entry["relevance_score"] for entry in made["results"]}
    np.testing.assert_allclose([found[0], found[1]], scores, atol=1e-3)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": QUERY, "documents": ["a", {"nothing": 1}]}, "documents[1]"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/score", {"text_1": QUERY, "text_2": [{"image": "no address"}]}, "text_2[0].image_url.url"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "model"),
    ],
)
async def test_what_a_reranker_refuses(served, path, body, param):
    status, made = await served.post(path, "scores", **body)
    assert status == 400 and made["error"]["param"] == param, made


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"messages": [{"role": "system", "content": "b"}], "instruction": "c"}, "instruction"),
        ({"input": "a", "instruction": 1}, "instruction"),
    ],
)
async def test_what_an_embedding_model_refuses(served, body, param):
    status, made = await served.post("/v1/embeddings", **body)
    assert status == 400 and made["error"]["param"] == param, made
