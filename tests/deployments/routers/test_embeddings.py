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


async def test_placeholder_strings_in_texts_are_plain_text(client, llm):
    texts = ["a red circle", "see <|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>"]
    found = vectors(await client.embeddings.create(model="tests/vectors", input=texts))
    tokenizer = llm.get_tokenizer()
    start, end = (tokenizer.token_id(token) for token in ("<|vision_start|>", "<|vision_end|>"))
    see, image, video = (tokenizer.encode_plain(text) for text in ("see ", "<|image_pad|>", "<|video_pad|>"))
    ids = [tokenizer.encode(texts[0]), [*see, start, *image, end], video]
    wanted = [o.embedding for o in llm.embed([{"prompt_token_ids": i} for i in ids], use_tqdm=False)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


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
    """Over HTTP as the model was trained: an image alone, and bare texts."""

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
        ({}, "input or messages, one of the two"),
        ({"input": []}, "1 to 2048"),
        ({"input": ["a"] * 2049}, "1 to 2048"),
        ({"input": "a", "dimensions": 1000}, "vectors have 256"),
        ({"input": "a", "dimensions": 0}, "at least 1"),
        ({"input": ""}, "empty text"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "number of tokens"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "number of tokens"),
        ({"messages": ask("What is this?"), "truncate_prompt_tokens": 9}, "truncate_prompt_tokens"),
        ({"input": "a", "pooling": "max"}, "last, mean, cls"),
        ({"input": "word " * 2000}, "512"),
        ({"input": [10**7]}, "vocabulary"),
        ({"input": "a", "model": "pocket"}, "generates text"),
    ],
)
async def test_what_cannot_be_embedded(client, change, words):
    with pytest.raises(openai.BadRequestError, match=words):
        await client.post("/embeddings", body={"model": "tests/vectors"} | change, cast_to=object)


async def test_fewer_dimensions_are_the_first_ones_at_length_one(client):
    async def vector(**options):
        made = await client.embeddings.create(
            model="tests/vectors", input="red", encoding_format="float", **options
        )
        return np.array(made.data[0].embedding)

    whole, cut = await vector(), await vector(dimensions=8)
    assert len(whole) == 256 and np.array_equal(await vector(dimensions=256), whole)
    assert np.allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)


async def test_a_long_text_can_be_cut(client):
    async def tokens(**options) -> int:
        body = {"model": "tests/vectors", "input": "word " * 2000, **options}
        return (await client.post("/embeddings", body=body, cast_to=dict))["usage"]["prompt_tokens"]

    assert await tokens(truncate_prompt_tokens=-1) == 512
    assert await tokens(truncate_prompt_tokens=7) == 7


async def test_null_asks_for_the_default(client):
    names = (
        "encoding_format",
        "pooling",
        "normalize",
        "add_special_tokens",
        "add_generation_prompt",
        "cache_salt",
    )
    body = {"model": "tests/vectors", "input": "a", "user": "me"} | dict.fromkeys(names)
    made = await client.post("/embeddings", body=body, cast_to=dict)
    assert isinstance(made["data"][0]["embedding"], list)
