"""Embeddings over HTTP, from the application's second model."""

import numpy as np
import openai
import pytest

from engine import LLM
from tests.deployments.pictures import ask, circle, square
from tests.serving import ROOT

pytestmark = pytest.mark.usefixtures("idle_afterwards")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(ROOT / "models" / "pocket-embed"), task="embed", max_model_len=512)


def vectors(response) -> np.ndarray:
    return np.array([item.embedding for item in response.data])


async def test_texts_and_token_ids(client, llm):
    """OpenAI's client asks for base64 and decodes it."""
    texts = ["a red circle", "two squares", "hello"]
    made = await client.embeddings.create(model="tests/vectors", input=texts)
    wanted = [output.embedding for output in llm.embed(texts, use_tqdm=False)]
    np.testing.assert_allclose(vectors(made), wanted, atol=1e-5)
    assert [item.index for item in made.data] == [0, 1, 2]
    ids = [llm.get_tokenizer().encode(text) for text in texts]
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, ids))
    again = await client.embeddings.create(model="tests/vectors", input=ids, encoding_format="float")
    np.testing.assert_allclose(vectors(again), wanted, atol=1e-5)
    one = await client.embeddings.create(model="tests/vectors", input=texts[0])
    np.testing.assert_allclose(vectors(one)[0], wanted[0], atol=1e-5)


async def test_messages_with_pictures(client, llm):
    async def embed(*pictures):
        body = {"model": "tests/vectors", "messages": ask("What is this?", *pictures)}
        made = await client.post("/embeddings", body=body, cast_to=openai.types.CreateEmbeddingResponse)
        return vectors(made)[0]

    red, blue = await embed(circle("red")), await embed(circle("blue"))
    assert np.linalg.norm(red) == pytest.approx(1.0, abs=1e-5)
    assert red @ await embed(circle("red")) == pytest.approx(1.0, abs=1e-5) and red @ blue < 0.999
    (wanted,) = llm.embed(messages=ask("What is this?", square("red"), circle("blue")), use_tqdm=False)
    np.testing.assert_allclose(await embed(square("red"), circle("blue")), wanted.embedding, atol=1e-4)


async def test_texts_find_their_pictures(client):
    """Over HTTP as the model was trained: a picture alone, and bare texts."""

    async def embed(picture):
        picture_alone = [{"role": "user", "content": ask("", picture)[0]["content"][:1]}]
        body = {"model": "tests/vectors", "messages": picture_alone}
        made = await client.post("/embeddings", body=body, cast_to=openai.types.CreateEmbeddingResponse)
        return vectors(made)[0]

    texts = ["A red circle.", "A blue circle.", "A red square.", "A blue square."]
    found = vectors(await client.embeddings.create(model="tests/vectors", input=texts))
    pictures = [await embed(shape(color)) for shape in (circle, square) for color in ("red", "blue")]
    assert (found @ np.array(pictures).T).argmax(axis=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "either input or messages"),
        ({"input": []}, "1 to 2048"),
        ({"input": ["a"] * 2049}, "1 to 2048"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "last, mean, cls"),
        ({"input": "word " * 2000}, "512"),
        ({"input": [10**7]}, "vocabulary"),
        ({"input": "a", "model": "pocket"}, "generates text"),
    ],
)
async def test_what_cannot_be_embedded(client, change, words):
    with pytest.raises(openai.BadRequestError, match=words):
        await client.post("/embeddings", body={"model": "tests/vectors"} | change, cast_to=object)
