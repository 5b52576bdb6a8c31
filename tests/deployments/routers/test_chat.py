"""Chat completions: from an HTTP request with an image to the answer."""

import asyncio
import json

import openai
import pytest

from tests.deployments.pictures import CASES, ask, circle, data_url, square
from tests.serving import wait_until

pytestmark = pytest.mark.usefixtures("idle_afterwards")


async def answer(client, messages, **options) -> str:
    made = await client.chat.completions.create(
        model="pocket", messages=messages, **{"max_tokens": 40, "temperature": 0} | options
    )
    return made.choices[0].message.content


async def test_sixteen_at_once_each_with_its_own_picture(client):
    given = await asyncio.gather(*(answer(client, ask(case.question, case.picture)) for case in CASES))
    wrong = {case.word: text for case, text in zip(CASES, given, strict=True) if case.word not in text}
    assert not wrong


async def test_streamed_and_whole_say_the_same(client):
    for case in CASES[::3]:
        messages = ask(case.question, case.picture)
        stream = await client.chat.completions.create(
            model="pocket",
            messages=messages,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert case.word in text and text == await answer(client, messages)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        usage = chunks[-1].usage
        assert not chunks[-1].choices and usage.completion_tokens > 3
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_two_pictures_keep_their_order(client):
    red, blue = circle("red"), circle("blue")
    question = "Do both pictures show the same color?"
    assert await answer(client, ask(question, red, blue)) == "No, first red, then blue."
    assert await answer(client, ask(question, blue, red)) == "No, first blue, then red."


async def test_a_picture_between_texts_and_a_follow_up(client):
    content = [
        {"type": "image_url", "image_url": {"url": data_url(square("red"), "JPEG")}},
        {"type": "text", "text": "What shape is this?"},
    ]
    messages = [{"role": "user", "content": content}]
    first = await answer(client, messages)
    assert "square" in first
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "What color is the square?"},
    ]
    second = await client.chat.completions.create(
        model="pocket", messages=messages, max_tokens=40, temperature=0
    )
    assert "red" in second.choices[0].message.content
    # The first turn is not computed again.
    assert second.usage.prompt_tokens_details.cached_tokens >= 32


async def test_pictures_by_url_among_texts(running, client):
    circle("red").save(running.pictures / "a.png")
    circle("blue").save(running.pictures / "b.webp", lossless=True)
    content = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": f"{running.site}/a.png"}},
        {"type": "text", "text": "Now this one:"},
        {"type": "image_url", "image_url": {"url": f"{running.site}/b.webp"}},
        {"type": "text", "text": "Do both pictures show the same color?"},
    ]
    fetched = await answer(client, [{"role": "user", "content": content}])
    content[1]["image_url"]["url"] = data_url(circle("red"))
    assert fetched == await answer(client, [{"role": "user", "content": content}])
    content[1]["image_url"]["url"] = data_url(circle("blue"))
    assert fetched != await answer(client, [{"role": "user", "content": content}])
    content[1]["image_url"]["url"] = f"{running.site}/missing.png"
    with pytest.raises(openai.BadRequestError, match="answered with status 404") as caught:
        await answer(client, [{"role": "user", "content": content}])
    assert caught.value.param == "messages[0].content[1].image_url.url"


async def test_without_a_picture(client):
    said = await answer(client, [{"role": "user", "content": "Hello!"}])
    assert said.startswith("Hello! Show me a picture")


async def test_answers_are_cut_where_the_request_says(client):
    made = await client.chat.completions.create(
        model="pocket", messages=[{"role": "user", "content": "Hello!"}], max_tokens=2, temperature=0
    )
    assert made.choices[0].finish_reason == "length" and made.usage.completion_tokens == 2
    whole = await answer(client, [{"role": "user", "content": "Hello!"}])
    made = await client.chat.completions.create(
        model="pocket",
        messages=[{"role": "user", "content": "Hello!"}],
        stop=[" picture"],
        max_tokens=40,
        temperature=0,
    )
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].message.content == whole[: whole.index(" picture")]


async def test_several_choices_and_their_probabilities(client):
    made = await client.chat.completions.create(
        model="pocket",
        messages=ask("What color is the circle?", circle("blue")),
        n=3,
        temperature=0.7,
        seed=5,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    for choice in made.choices:
        pieces = [token.token for token in choice.logprobs.content]
        assert "".join(pieces) == choice.message.content
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


@pytest.mark.parametrize("stream", [False, True])
async def test_each_of_several_choices_ends_at_its_own_stop_string(client, stream):
    """Sequences that share a prompt end at different times, and one may never meet the string."""
    asked = {
        "model": "pocket",
        "messages": ask("Describe this image.", circle("blue"), square("red")),
        "n": 4,
        "temperature": 1.2,
        "seed": 11,
        "max_tokens": 24,
    }
    free = [choice.message.content for choice in (await client.chat.completions.create(**asked)).choices]
    cut = " circle on"
    assert 0 < sum(cut in text for text in free) < 4
    made = await client.chat.completions.create(**asked, stop=[cut], stream=stream)
    texts, reasons = [""] * 4, [None] * 4
    if stream:
        async for chunk in made:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    else:
        texts = [choice.message.content for choice in made.choices]
        reasons = [choice.finish_reason for choice in made.choices]
    assert texts == [text.partition(cut)[0] for text in free] and reasons == ["stop"] * 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"extra_body": {"guided_choice": ["é😀 ok"]}},
        {"extra_body": {"guided_choice": ["日本"]}},
        {"extra_body": {"guided_choice": ["ab日cd"]}, "stop": ["c"]},
        {"extra_body": {"guided_choice": ["日本語"]}, "stop": ["本"]},
        {"extra_body": {"guided_choice": ["the STOP now"]}, "stop": ["STOP", "P n"]},
        {"extra_body": {"guided_choice": ["abc"], "include_stop_str_in_output": True}, "stop": ["b"]},
        {"extra_body": {"skip_special_tokens": False}},
        {"max_tokens": 2, "stop": ["never"]},
    ],
    ids=str,
)
async def test_bytes_and_texts_of_tokens_join_up_to_the_content(client, options, stream):
    request = {
        "model": "pocket",
        "messages": [{"role": "user", "content": "Hello!"}],
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        **options,
    }
    if stream:
        chunks = [c async for c in await client.chat.completions.create(**request, stream=True)]
        content = "".join(c.choices[0].delta.content or "" for c in chunks)
        rows = [row for c in chunks if c.choices[0].logprobs for row in c.choices[0].logprobs.content]
    else:
        (choice,) = (await client.chat.completions.create(**request)).choices
        content, rows = choice.message.content, choice.logprobs.content
    assert content
    assert bytes(byte for row in rows for byte in row.bytes) == content.encode()
    assert "".join(row.token for row in rows) == content
    ends = [top for row in rows for top in row.top_logprobs if top.token == "<|im_end|>"]
    if "skip_special_tokens" not in options.get("extra_body", {}):
        assert all(top.bytes is None for top in ends)


async def test_an_answer_that_cannot_go_on_is_an_error(client):
    """Its grammar lets it begin, another constraint keeps it from ending: it must not look whole."""
    request = {
        "model": "pocket",
        "messages": [{"role": "user", "content": "Hello!"}],
        "extra_body": {"guided_regex": "xx~", "bad_words": ["~"]},
    }
    with pytest.raises(openai.BadRequestError, match="after 2 tokens, guided_regex and bad_words") as refused:
        await client.chat.completions.create(**request)
    assert refused.value.code == "no_token_allowed"
    text = ""
    with pytest.raises(openai.APIError, match="can't go on"):
        async for chunk in await client.chat.completions.create(**request, stream=True):
            text += chunk.choices[0].delta.content or ""
            assert chunk.choices[0].finish_reason is None
    assert text == "xx"


async def test_an_answer_in_json(client):
    schema = {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    for temperature in (0, 1.5):
        text = await answer(
            client,
            ask("What color is the circle?", circle("blue")),
            response_format=wanted,
            temperature=temperature,
            seed=3,
            max_tokens=400,
        )
        found = json.loads(text)
        assert found["color"] in ("red", "green", "blue") and isinstance(found["count"], int)
    text = await answer(
        client,
        ask("What color is the circle?", circle("blue")),
        extra_body={"structured_outputs": {"choice": ["The circle is red.", "The circle is blue."]}},
    )
    assert text == "The circle is blue."


async def test_a_constraint_and_a_stop_string_together(client):
    text = await answer(
        client,
        [{"role": "user", "content": "Hello!"}],
        stop=["3"],
        extra_body={"guided_regex": "1234567"},
    )
    assert text == "12"


async def test_log_probabilities_of_the_prompt(client):
    made = await client.chat.completions.create(
        model="pocket",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=1,
        extra_body={"prompt_logprobs": 2},
    )
    rows = made.model_extra["prompt_logprobs"]
    assert len(rows) == made.usage.prompt_tokens and rows[0] is None
    for row in rows[1:]:
        assert 2 <= len(row) <= 3
        assert all(value["logprob"] <= 0 and value["rank"] >= 1 for value in row.values())
        assert {1, 2} <= {value["rank"] for value in row.values()}


async def test_tenants_share_no_cache(running, client):
    """Neither the language model's cache nor the encoder's."""

    def encoded() -> float:
        return running.pocket.encoder.metrics()["items"]

    async def cached(salt: str) -> int:
        made = await client.chat.completions.create(
            model="pocket",
            messages=ask("What color is the circle?", circle("pink", (210, 160))),
            max_tokens=1,
            extra_body={"cache_salt": salt, "priority": -1},
        )
        return made.usage.prompt_tokens_details.cached_tokens

    before = encoded()
    assert await cached("one") == 0 and encoded() == before + 1
    assert await cached("one") > 0 and encoded() == before + 1
    assert await cached("two") == 0 and encoded() == before + 2


async def test_a_client_that_leaves_a_stream_frees_its_blocks_at_once(running, http):
    """Far more tokens are asked for than the test would wait for."""
    body = {
        "model": "pocket",
        "messages": ask("What color is the circle?", circle("red")),
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    engine = running.pocket.language_model
    before = engine.metrics()["output_tokens"]
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert (await anext(response.aiter_lines())).startswith("data: ")
        assert engine.metrics()["running"] == 1
    await wait_until(lambda: engine.metrics()["running"] == 0)
    await running.wait_until_idle()
    assert engine.metrics()["output_tokens"] - before < 900


async def test_a_choice_that_a_stop_string_ends_is_not_computed_beside_one_that_goes_on(running, client):
    async def choices(**options) -> list[str]:
        made = await client.chat.completions.create(
            model="pocket",
            messages=ask("What color is the circle?", circle("red")),
            n=2,
            max_tokens=100,
            seed=5,
            temperature=1.5,
            extra_body={"ignore_eos": True},
            **options,
        )
        return [choice.message.content for choice in made.choices]

    first, second = await choices()
    stop = next(first[i : i + 4] for i in range(len(first)) if first[i : i + 4] not in second)
    engine = running.pocket.language_model
    before = engine.metrics()["output_tokens"]
    assert await choices(stop=[stop]) == [first[: first.index(stop)], second]
    await running.wait_until_idle()
    assert engine.metrics()["output_tokens"] - before < 150


async def test_a_client_that_leaves_before_the_whole_answer_is_noticed_too(running, http):
    body = {
        "model": "pocket",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 900,
        "ignore_eos": True,
    }
    engine = running.pocket.language_model
    before = engine.metrics()["output_tokens"]
    request = asyncio.ensure_future(http.post("/v1/chat/completions", json=body))
    await wait_until(lambda: engine.metrics()["running"] == 1)
    request.cancel()
    await wait_until(lambda: engine.metrics()["running"] == 0)
    assert engine.metrics()["output_tokens"] - before < 900


async def test_others_never_notice_a_bad_picture(client):
    """A broken image amid good requests."""
    broken = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]

    async def spoil() -> list[str]:
        codes = []
        for _ in range(8):
            with pytest.raises(openai.BadRequestError) as caught:
                await answer(client, broken)
            codes.append(caught.value.body["code"])
        return codes

    spoiling = asyncio.ensure_future(spoil())
    given = await asyncio.gather(*(answer(client, ask(c.question, c.picture)) for c in CASES[:8]))
    assert all(case.word in text for case, text in zip(CASES[:8], given, strict=True))
    assert await spoiling == ["invalid_image"] * 8
