"""Vectors of all tokens over HTTP."""

import base64

import numpy as np
import pytest

from deployments import vectors
from engine import LLM
from tests.deployments.pictures import ask, circle
from tests.serving import ROOT

pytestmark = pytest.mark.usefixtures("idle_afterwards")

TEXTS = ["a red circle", "two squares"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(ROOT / "models" / "pocket-embed"), task="embed", max_model_len=512)


async def pool(http, **fields):
    response = await http.post("/pooling", json={"model": "tests/vectors", **fields})
    return response.status_code, response.json()


@pytest.mark.parametrize("normalize", [True, False])
async def test_a_vector_for_each_token(http, llm, normalize):
    status, made = await pool(http, input=TEXTS, normalize=normalize)
    assert status == 200 and made["object"] == "list"
    outputs = llm.embed(TEXTS, pooling="all", normalize=normalize, use_tqdm=False)
    for index, (item, output) in enumerate(zip(made["data"], outputs, strict=True)):
        assert item["index"] == index and item["shape"] == list(output.token_embeddings.shape)
        np.testing.assert_allclose(item["data"], output.token_embeddings, rtol=1e-4, atol=1e-5)
    assert made["usage"]["prompt_tokens"] == sum(len(o.prompt_token_ids) for o in outputs)


async def test_base64_and_images(http, llm):
    messages = ask("What is this?", circle("red"))
    _, made = await pool(http, messages=messages, encoding_format="base64")
    (item,) = made["data"]
    found = np.frombuffer(base64.b64decode(item["data"]), "<f4").reshape(item["shape"])
    (wanted,) = llm.embed(messages=messages, pooling="all", use_tqdm=False)
    np.testing.assert_allclose(found, wanted.token_embeddings, atol=1e-4)
    (other,) = llm.embed(messages=ask("What is this?", circle("blue")), pooling="all", use_tqdm=False)
    assert np.abs(found - other.token_embeddings).max() > 0.01


async def test_one_vector_is_the_embedding(http):
    _, made = await pool(http, input=TEXTS, task="embed")
    embedded = (await http.post("/v1/embeddings", json={"model": "tests/vectors", "input": TEXTS})).json()
    for one, other in zip(made["data"], embedded["data"], strict=True):
        np.testing.assert_allclose(one["data"], other["embedding"], atol=1e-6)
        assert one["shape"] == [len(one["data"])]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({}, "input"),
        ({"input": "a", "pooling": "mean"}, "pooling"),
        ({"input": "a", "task": "classify"}, "task"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "red " * 2000}, "input"),
        ({"model": "pocket", "input": "a"}, None),
    ],
)
async def test_what_is_refused(http, fields, param):
    status, made = await pool(http, **fields)
    assert status == 400 and param in (None, made["error"]["param"]), made


async def test_an_answer_of_too_many_numbers_is_refused(http, monkeypatch):
    monkeypatch.setattr(vectors, "MAX_NUMBERS", 1000)
    status, made = await pool(http, input=TEXTS * 10)
    assert status == 400 and made["error"]["param"] == "input"
    assert "send fewer inputs" in made["error"]["message"]
