"""Text completions."""

import math

import openai
import pytest

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]


async def complete(client, **options):
    given = {"model": "pocket", "prompt": "Hello", "temperature": 0, "max_tokens": 8}
    return await client.completions.create(**given | options)


async def chat_tokens(client) -> list[int]:
    body = {"model": "pocket", "messages": HELLO}
    return (await client.post("/tokenize", body=body, cast_to=dict))["tokens"]


async def test_the_chats_prompt_is_answered_as_the_chat_is(client):
    asked = await client.chat.completions.create(model="pocket", messages=HELLO, temperature=0, max_tokens=8)
    made = await complete(client, prompt=await chat_tokens(client))
    assert made.object == "text_completion" and made.id.startswith("cmpl-")
    assert made.choices[0].text == asked.choices[0].message.content
    assert made.choices[0].finish_reason == asked.choices[0].finish_reason
    assert made.usage == asked.usage


async def test_prompts_in_lists_and_several_choices(client):
    alone = [(await complete(client, prompt=text)).choices[0].text for text in ("Hello", "red circle")]
    made = await complete(client, prompt=["Hello", "red circle"], n=2)
    assert [choice.text for choice in made.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    ids = await chat_tokens(client)
    both = await complete(client, prompt=[ids, ids])
    assert len({choice.text for choice in both.choices}) == 1
    assert both.usage.prompt_tokens == 2 * len(ids)


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": ["Hello", "red circle"], "logprobs": 1},
        # Text waits for what may become a stop string; its tokens come at once, or with it.
        {"prompt": "Is the square left of the circle?", "logprobs": 1, "max_tokens": 8, "stop": "on a white"},
        {
            "prompt": [[57, 76], [75]],
            "echo": True,
            "max_tokens": 0,
            "extra_body": {"return_token_ids": True},
        },
        {"prompt": ["red circle", "a"], "echo": True, "logprobs": 2, "n": 2, "max_tokens": 3},
        {"prompt": ["red circle", "a"], "echo": True, "logprobs": 0, "max_tokens": 0},
        # A step takes 512 tokens: the second prompt is scored in two pieces.
        {"prompt": [[75] * 400, [76] * 400], "echo": True, "logprobs": 0, "max_tokens": 2},
    ],
    ids=["two", "stop", "echo", "scored echo", "scored echo alone", "long scored echoes"],
)
async def test_a_streamed_completion_is_the_whole_one(client, asked):
    whole = await complete(client, **asked)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [chunk async for chunk in await complete(client, **asked, **options)]
    for index, wanted in enumerate(whole.choices):
        found = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in found) == wanted.text
        assert [c.finish_reason for c in found if c.finish_reason] == [wanted.finish_reason]
        ids = [id for choice in found for id in (choice.model_extra or {}).get("token_ids", ())]
        assert ids == (wanted.model_extra or {}).get("token_ids", [])
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs") if wanted.logprobs else ():
            pieces = [piece for c in found if c.logprobs for piece in getattr(c.logprobs, name)]
            given = getattr(wanted.logprobs, name)
            # Another batch may change the last bits.
            if name == "token_logprobs":
                given = pytest.approx(given, abs=1e-4)
            elif name == "top_logprobs":
                given = [row and pytest.approx(row, abs=1e-4) for row in given]
            assert pieces == given
    assert chunks[-1].usage == whole.usage and not any(chunk.usage for chunk in chunks[:-1])


async def test_echo(client):
    plain = await complete(client, prompt="red circle", max_tokens=1)
    made = await complete(client, prompt="red circle", max_tokens=1, echo=True, logprobs=2)
    assert made.choices[0].text == "red circle" + plain.choices[0].text
    logprobs = made.choices[0].logprobs
    assert "".join(logprobs.tokens) == made.choices[0].text
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert made.choices[0].text[offset:].startswith(token)
    only = await complete(client, prompt="red circle", echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == "red circle" and only.usage.completion_tokens == 0
    assert "".join(only.choices[0].logprobs.tokens) == "red circle"


async def test_all_tokens_have_log_probabilities(client):
    """Evaluation harnesses count them: from the beginning those of a context, and one from the end."""
    text = "<|im_start|>user\n\N{PARTY POPPER}<|im_end|>\n"
    made = await complete(client, prompt=text + "Read the word.", max_tokens=1, echo=True, logprobs=0)
    ((choice,), logprobs) = made.choices, made.choices[0].logprobs
    assert (choice.text, choice.finish_reason) == (text + "Read the word.", "stop")
    tokens, offsets = logprobs.tokens, logprobs.text_offset
    assert len(tokens) == len(offsets) == made.usage.prompt_tokens + 1 and tokens[-1] == "<|im_end|>"
    ends = [*offsets[1:], len(choice.text)]
    assert [choice.text[start:end] for start, end in zip(offsets, ends, strict=True)] == [*tokens[:-1], ""]
    assert math.fsum(next(iter(row.values())) for row in logprobs.top_logprobs[1:]) == pytest.approx(
        math.fsum(logprobs.token_logprobs[1:])
    )


async def test_log_probabilities_of_the_prompt(client):
    """They are those of an echo, by token id, as vLLM gives them; the text is the completion alone."""
    ids = (await client.post("/tokenize", body={"model": "pocket", "prompt": "red circle"}, cast_to=dict))[
        "tokens"
    ]
    echoed = await complete(client, prompt="red circle", max_tokens=1, echo=True, logprobs=2)
    for options in ({}, {"echo": True, "logprobs": 1}):
        made = await complete(
            client, prompt=["red circle"], max_tokens=1, extra_body={"prompt_logprobs": 2}, **options
        )
        rows = made.choices[0].model_extra["prompt_logprobs"]
        assert rows[0] is None and len(rows) == len(ids)
        found = [row[str(token)]["logprob"] for token, row in zip(ids[1:], rows[1:], strict=True)]
        assert found == pytest.approx(echoed.choices[0].logprobs.token_logprobs[1 : len(ids)], abs=1e-4)
        assert all({1, 2} <= {value["rank"] for value in row.values()} for row in rows[1:])
    assert "prompt_logprobs" not in echoed.choices[0].model_extra
    with pytest.raises(openai.BadRequestError) as refused:
        await complete(client, stream=True, extra_body={"prompt_logprobs": 2})
    assert refused.value.param == "prompt_logprobs"


async def test_sixteen_tokens_are_the_default(client):
    made = await complete(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert made.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [10**7]}, "prompt"),
        ({"prompt": "word " * 3000}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 4}, "best_of"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused(client, change, param, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        await complete(client, **change, stream=stream)
    assert refused.value.param == param
