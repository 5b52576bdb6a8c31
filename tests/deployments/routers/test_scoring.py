"""Scores and ranks."""

import numpy as np
import pytest

from tests.deployments.pictures import circle, data_url, square

pytestmark = pytest.mark.usefixtures("idle_afterwards")


async def post(http, path: str, **body):
    response = await http.post(path, json={"model": "tests/vectors", **body})
    return response.status_code, response.json()


async def vector(client, text: str) -> np.ndarray:
    made = await client.embeddings.create(model="tests/vectors", input=text, encoding_format="float")
    return np.array(made.data[0].embedding)


async def test_a_score_is_the_cosine_of_the_embeddings(http, client):
    red, blue = await vector(client, "a red circle"), await vector(client, "a blue square")
    status, made = await post(
        http, "/v1/score", text_1="a red circle", text_2=["a blue square", "a red circle"]
    )
    assert status == 200 and [entry["index"] for entry in made["data"]] == [0, 1]
    assert np.allclose([entry["score"] for entry in made["data"]], [red @ blue, 1], atol=1e-4)
    # No cosine is beyond 1, though equal vectors' product is rounded.
    words = ["a", "b", "a red circle", "two stars", "red", "blue", "a green square on white"]
    _, made = await post(http, "/v1/score", text_1=words, text_2=words)
    assert all(1 - 1e-6 < entry["score"] <= 1 for entry in made["data"])
    pairs = {"text_1": ["a red circle", "a blue square"], "text_2": ["a blue square", "a red circle"]}
    _, made = await post(http, "/score", **pairs)
    assert made["data"][0]["score"] == pytest.approx(made["data"][1]["score"])


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
async def test_images_are_ranked_by_a_text(http, path):
    images = [{"image": data_url(square("blue"))}, {"image_url": {"url": data_url(circle("red"))}}]
    status, made = await post(http, path, query="a red circle", documents=images)
    assert status == 200, made
    assert [result["index"] for result in made["results"]] == [1, 0]
    assert made["results"][0]["document"] == images[1]


async def test_the_best_few_without_their_documents(http):
    documents = ["a blue square", "a red circle", "a red circle"]
    _, made = await post(
        http, "/rerank", query="a red circle", documents=documents, top_n=2, return_documents=False
    )
    # Equal documents keep their order.
    assert [result["index"] for result in made["results"]] == [1, 2]
    assert all("document" not in result for result in made["results"])
    assert made["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b", {"nothing": 1}]}, "documents[1]"),
        ("/rerank", {"query": "a", "documents": ["b", ""]}, "documents[1]"),
        ("/score", {"text_1": "a", "text_2": ["b", "c", ""]}, "text_2[2]"),
        ("/score", {"text_1": ["a", ""], "text_2": "b"}, "text_2"),
        ("/rerank", {"query": "", "documents": ["b"]}, "query"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/score", {"text_1": [], "text_2": ["a"]}, "text_2"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"queries": "a", "documents": ["b", ""]}, "documents[1]"),
        ("/score", {"data_1": ["a", "b"], "items": ["a", "b", "c"]}, "items"),
    ],
)
async def test_what_is_refused(http, path, body, param):
    status, made = await post(http, path, **body)
    assert status == 400 and made["error"]["param"] == param, made
