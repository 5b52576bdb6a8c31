"""Fields that users of vLLM's server send: they work, or are refused by name."""

import base64
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from deployments.routers.values import whole_response
from deployments.vectors import encoded
from engine.parsers.formats import REASONING_TAGS
from engine.sampling_params import SamplingParams
from tests.deployments.parameters import BODIES
from tests.deployments.pictures import circle, data_url

pytestmark = pytest.mark.usefixtures("idle_afterwards")

CHAT = {"model": "pocket", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
PICTURE = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(circle("red"))}}]}
]


async def post(http, path: str, **body):
    response = await http.post(path, json=body)
    return response.status_code, response.json()


@pytest.mark.parametrize("path", [path for path, body in BODIES.items() if body.DEFAULTS])
async def test_the_default_of_a_refused_field_asks_for_nothing(http, path):
    body = BODIES[path]
    given = {**body.EXAMPLE, "model": "tests/vectors" if "embed" in body.TASKS else "pocket"}
    for name, values in body.DEFAULTS.items():
        for value in values:
            status, made = await post(http, path, **given, **{name: value})
            assert status == 200, made
        status, made = await post(http, path, **given, **{name: "another"})
        assert status == 400 and name in made["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_what_is_not_offered_of_structured_outputs_is_refused_by_name(http, path):
    given = {**BODIES[path].EXAMPLE, "model": "pocket"}
    for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
        status, made = await post(http, path, **given, structured_outputs={"regex": "a", name: "x"})
        assert (status, made["error"]["param"]) == (400, f"structured_outputs.{name}")
        assert made["error"]["code"] == "unsupported_parameter"
    status, made = await post(
        http, path, **given, structured_outputs={"regex": "a", "whitespace_pattern": None}
    )
    assert status == 200, made


async def test_log_probabilities_name_tokens_by_their_ids(http):
    asked = {"max_tokens": 4, "return_token_ids": True, "return_tokens_as_token_ids": True}
    _, made = await post(http, "/v1/chat/completions", **CHAT, **asked, logprobs=True, top_logprobs=2)
    choice = made["choices"][0]
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    content = choice["logprobs"]["content"]
    assert [each["token"] for each in content] == names
    assert [each["top_logprobs"][0]["token"] for each in content] == names
    # Their text is still there.
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == choice["message"]["content"]

    given = {"model": "pocket", "prompt": "a red", "temperature": 0, "echo": True, "logprobs": 2, **asked}
    _, made = await post(http, "/v1/completions", **given)
    choice = made["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    found = choice["logprobs"]
    assert found["tokens"] == [f"token_id:{token}" for token in ids]
    rows = list(zip(found["tokens"], found["top_logprobs"], strict=True))[1:]
    assert all(name in tops and len(tops) in (2, 3) for name, tops in rows)
    assert any(len(tops) == 3 for _, tops in rows)
    _, plain = await post(http, "/v1/completions", **{**given, "return_tokens_as_token_ids": False})
    assert plain["choices"][0]["logprobs"]["text_offset"] == found["text_offset"]
    assert "".join(plain["choices"][0]["logprobs"]["tokens"]) == choice["text"]


async def test_log_probabilities_of_tokens_by_id(http):
    """Those of tokens that are unlikely too, streamed and whole, in both forms."""
    asked = {"return_tokens_as_token_ids": True}
    wanted = {**asked, "logprobs": True, "top_logprobs": 1, "max_tokens": 3}
    _, most = await post(http, "/v1/chat/completions", **CHAT, **{**wanted, "top_logprobs": 20})
    tops = most["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ids = [*(int(tops[rank]["token"].removeprefix("token_id:")) for rank in (3, 10, 3)), 600, 601]
    names = {f"token_id:{token}" for token in ids}
    _, two = await post(http, "/v1/chat/completions", **CHAT, **wanted, logprob_token_ids=ids, n=2)
    _, made = await post(http, "/v1/chat/completions", **CHAT, **wanted, logprob_token_ids=ids)
    for choice in two["choices"]:
        row, alone = choice["logprobs"]["content"][0], made["choices"][0]["logprobs"]["content"][0]
        assert [top["token"] for top in row["top_logprobs"]] == [t["token"] for t in alone["top_logprobs"]]
    known = 0
    for row, likeliest in zip(
        *(each["choices"][0]["logprobs"]["content"] for each in (made, most)), strict=True
    ):
        tops = {top["token"]: top["logprob"] for top in row["top_logprobs"]}
        assert tops.keys() == names | {likeliest["top_logprobs"][0]["token"]}
        both = {top["token"]: top["logprob"] for top in likeliest["top_logprobs"] if top["token"] in names}
        assert {name: tops[name] for name in both} == pytest.approx(both, abs=1e-4)
        known += len(both)
    assert known >= 2
    response = await http.post(
        "/v1/chat/completions", json={**CHAT, **wanted, "logprob_token_ids": ids, "stream": True}
    )
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[6:].startswith("{")]
    rows = [
        row for e in events for c in e["choices"] for row in (c["logprobs"] or {"content": []})["content"]
    ]
    assert rows == made["choices"][0]["logprobs"]["content"]
    given = {"model": "pocket", "prompt": "a red", "temperature": 0, "max_tokens": 2, "logprobs": 0, **asked}
    _, made = await post(http, "/v1/completions", **given, logprob_token_ids=ids)
    for token, tops in zip(
        *(made["choices"][0]["logprobs"][n] for n in ("tokens", "top_logprobs")), strict=True
    ):
        assert tops.keys() == names | {token}
    for path, fields in (
        ("/v1/chat/completions", {**CHAT, "logprob_token_ids": ids}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "logprob_token_ids": [100_000]}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "logprob_token_ids": [5] * 129}),
        # More than a million log-probabilities.
        (
            "/v1/chat/completions",
            {**CHAT, **wanted, "n": 128, "max_tokens": 65, "logprob_token_ids": [5] * 128},
        ),
        ("/v1/completions", {**given, "n": 128, "max_tokens": 65, "logprob_token_ids": [5] * 128}),
        ("/v1/completions", {"model": "pocket", "prompt": "a", "logprob_token_ids": ids}),
        ("/v1/completions", {**given, "logprob_token_ids": ids, "echo": True}),
    ):
        status, made = await post(http, path, **fields)
        assert (status, made["error"]["param"]) == (400, "logprob_token_ids")


async def test_long_responses_are_written_on_a_thread():
    makers = []

    def make():
        makers.append(threading.get_ident())
        return {"a": [{"b": {"c": iter([{"d": [1]}, None])}}], "e": {5: "\u20ac"}, "f": None}

    for params in ({"logprobs": 0}, {"prompt_logprobs": 0}):
        response = await whole_response(make, SamplingParams(**params))
        assert json.loads(response.body) == {
            "a": [{"b": {"c": [{"d": [1]}, None]}}],
            "e": {"5": "\u20ac"},
            "f": None,
        }
        assert makers.pop() != threading.get_ident()


async def test_a_streamed_completion_begins_with_the_ids_of_its_prompt(http):
    given = {"model": "pocket", "prompt": ["a red", "a"], "temperature": 0, "max_tokens": 3}
    given |= {"return_token_ids": True}
    _, whole = await post(http, "/v1/completions", **given)
    response = await http.post("/v1/completions", json={**given, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[6:].startswith("{")]
    for wanted in whole["choices"]:
        found = [c for event in events for c in event["choices"] if c["index"] == wanted["index"]]
        assert found[0]["prompt_token_ids"] == wanted["prompt_token_ids"]
        assert not any("prompt_token_ids" in choice for choice in found[1:])


async def test_an_answer_that_repeats_itself_ends(http):
    """Also in the middle of tokens that a grammar appends together, and not before min_tokens."""
    chat = "/v1/chat/completions"
    _, made = await post(http, "/tokenize", model="pocket", prompt="red")
    once = {**CHAT, "max_tokens": 30, "return_token_ids": True, "ignore_eos": True}
    once |= {"allowed_token_ids": made["tokens"][:1]}
    wanted = {"max_pattern_size": 1, "min_count": 4}
    for fields, count in (({}, 4), ({"min_tokens": 7}, 7), ({"max_tokens": 3}, 3)):
        _, made = await post(http, chat, **{**once, **fields}, repetition_detection=wanted)
        (choice,) = made["choices"]
        assert len(choice["token_ids"]) == count == made["usage"]["completion_tokens"]
        ends = ("length", None) if count == 3 else ("repetition", "repetition_detected")
        assert (choice["finish_reason"], choice["stop_reason"]) == ends
    forced = {**CHAT, "structured_outputs": {"regex": "(red ){30}"}, "return_token_ids": True}
    _, whole = await post(http, chat, **forced)
    _, made = await post(http, chat, **forced, repetition_detection={"max_pattern_size": 9, "min_count": 3})
    (choice,), ids = made["choices"], whole["choices"][0]["token_ids"]
    count = len(choice["token_ids"])
    assert choice["finish_reason"] == "repetition" and choice["token_ids"] == ids[:count]
    size = count // 3
    assert ids[count - 3 * size : count] == ids[count - size : count] * 3 and count < len(ids)
    given = {**forced, "repetition_detection": {"max_pattern_size": 9, "min_count": 3}, "stream": True}
    response = await http.post(chat, json=given)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[6:].startswith("{")]
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(each["delta"].get("content") or "" for each in choices) == choice["message"]["content"]
    assert choices[-1]["finish_reason"] == "repetition"
    status, made = await post(http, chat, **CHAT, repetition_detection={"max_pattern_size": 9})
    assert (status, made["error"]["param"]) == (400, "repetition_detection.min_count")


async def test_a_client_may_see_what_the_template_wrote(http):
    given = {**CHAT, "messages": PICTURE, "max_tokens": 1, "return_prompt_text": True}
    _, made = await post(http, "/v1/chat/completions", **given)
    _, plain = await post(http, "/v1/chat/completions", **{**given, "return_prompt_text": False})
    assert made["prompt_text"].count("<|image_pad|>") == 1 and "prompt_text" not in plain
    assert made["prompt_text"].endswith("assistant\n")
    response = await http.post("/v1/chat/completions", json={**given, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[6:].startswith("{")]
    assert [event.get("prompt_text") for event in events] == [made["prompt_text"]] + [None] * (
        len(events) - 1
    )


#: An answer with a thought, on a model that knows none.
THOUGHTFUL = {
    "structured_outputs": {"grammar": 'start: "<think>" /[a-f]{6}/ "</think>" /[a-f]{6}/'},
    "seed": 1,
}


async def test_thoughts_are_left_out_if_the_client_wants_none(http, running, monkeypatch):
    pipeline = running.app.api.state.pipelines["pocket"]
    thinking = replace(pipeline.format, reasoning=REASONING_TAGS["think"])
    monkeypatch.setattr(pipeline, "format", thinking)

    async def message(**fields) -> dict:
        _, made = await post(http, "/v1/chat/completions", **CHAT, **THOUGHTFUL, **fields)
        return {**made["choices"][0]["message"], "counted": made["usage"]["completion_tokens_details"]}

    whole, short = await message(), await message(include_reasoning=False)
    assert len(whole["reasoning"]) == len(whole["content"]) == 6
    assert short == {name: value for name, value in whole.items() if not name.startswith("reasoning")}
    assert whole["counted"]["reasoning_tokens"] > 0
    response = await http.post(
        "/v1/chat/completions", json={**CHAT, **THOUGHTFUL, "include_reasoning": False, "stream": True}
    )
    assert "reasoning" not in response.text and whole["content"][0] in response.text
    asked = {"model": "pocket", "input": "Hello", "temperature": 0, **THOUGHTFUL}
    for shown, kinds in ((True, ["reasoning", "message"]), (False, ["message"])):
        _, made = await post(http, "/v1/responses", **asked, include_reasoning=shown)
        assert [item["type"] for item in made["output"]] == kinds


async def test_a_thoughts_bound_by_any_of_its_names(http, running, monkeypatch):
    """A tokenizer without a token for the tag can't bound a thought, and the refusal names the field."""
    pipeline = running.app.api.state.pipelines["pocket"]
    thinking = replace(pipeline.format, reasoning=REASONING_TAGS["think"])
    monkeypatch.setattr(pipeline, "format", thinking)
    for fields, param in (
        ({"thinking_token_budget": 3}, "thinking_token_budget"),
        ({"thinking_budget": 3, "thinking_token_budget": -1}, "thinking_budget"),
        ({"thinking": {"type": "enabled", "budget_tokens": 3}}, "thinking.budget_tokens"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
    ):
        status, made = await post(http, "/v1/chat/completions", **CHAT, **fields)
        assert (status, made["error"]["param"]) == (400, param)
    # vLLM: no bound.
    status, _ = await post(http, "/v1/chat/completions", **CHAT, max_tokens=1, thinking_token_budget=-1)
    assert status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_thinking_is_turned_on_and_off_by_other_names(path):
    body = BODIES[path]

    def options(**fields) -> dict:
        return body.read({**body.EXAMPLE, "model": "a", **fields}).template_options()

    assert options(enable_thinking=False)["enable_thinking"] is False
    assert options(enable_thinking=True)["enable_thinking"] is True
    # What is said to the template itself holds.
    both = options(enable_thinking=True, chat_template_kwargs={"enable_thinking": False, "a": 1})
    assert both["enable_thinking"] is False and both["a"] == 1
    assert options().get("enable_thinking") == (False if path == "/v1/messages" else None)


async def vector(http, **body) -> np.ndarray:
    status, made = await post(http, "/v1/embeddings", model="tests/vectors", **body)
    assert status == 200, made
    return np.array(made["data"][0]["embedding"])


async def test_inputs_are_cut_on_the_side_that_was_asked_for(http):
    ids = [5, 6, 7, 8, 9]
    for side, kept in (("right", ids[:2]), ("left", ids[-2:])):
        cut = await vector(http, input=ids, truncate_prompt_tokens=2, truncation_side=side)
        assert np.allclose(cut, await vector(http, input=kept), atol=1e-5)
    whole = await vector(http, input=ids, truncate_prompt_tokens=9, truncation_side="left")
    assert np.allclose(whole, await vector(http, input=ids), atol=1e-5)


async def test_activation_is_vllms_word_for_length_one(http):
    long, short = await vector(http, input="red", use_activation=False), await vector(http, input="red")
    assert np.linalg.norm(long) > 1.5 and np.linalg.norm(short) == pytest.approx(1, abs=1e-4)
    assert np.allclose(long, await vector(http, input="red", normalize=False), atol=1e-4)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
async def test_base64_holds_the_numbers_that_were_asked_for(http, path):
    async def data(**fields):
        _, made = await post(http, path, model="tests/vectors", input="a red circle", **fields)
        (found,) = made["data"]
        return found["embedding" if path == "/v1/embeddings" else "data"]

    exact = torch.tensor(await data())
    for dtype in ("float32", "float16", "bfloat16"):
        for order in ("little", "big", "native"):
            raw = base64.b64decode(await data(encoding_format="base64", embed_dtype=dtype, endianness=order))
            wanted = exact.to(getattr(torch, dtype))
            size = wanted.element_size()
            numbers = np.frombuffer(raw, f"{'>' if order == 'big' else '<'}i{size}").astype(f"i{size}")
            found = torch.from_numpy(numbers).view(wanted.dtype).view(wanted.shape)
            # A sum of floats may have other last bits in another batch.
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=2**-7 if size == 2 else 1e-5)
            if dtype != "float32":
                assert len(raw) == 2 * exact.numel()
    for name, value in (("embed_dtype", "float16"), ("endianness", "big"), ("embed_dtype", "int8")):
        encoding = "base64" if value == "int8" else "float"
        status, made = await post(
            http, path, model="tests/vectors", input="a", encoding_format=encoding, **{name: value}
        )
        assert (status, made["error"]["param"]) == (400, name)


def test_bfloat16_is_rounded_as_torch_does():
    values = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 3
    values[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0])
    body = BODIES["/v1/embeddings"].read(
        {"input": "a", "encoding_format": "base64", "embed_dtype": "bfloat16"}
    )
    raw = np.frombuffer(base64.b64decode(encoded(values.numpy(), body)), "<i2")
    assert torch.equal(torch.from_numpy(raw.copy()), values.bfloat16().view(torch.int16))


async def test_many_conversations_have_a_vector_each(http):
    """In messages or in input, with images or without."""
    chats = [PICTURE, [{"role": "user", "content": "a blue square"}], [*PICTURE, *PICTURE]]
    alone = [await vector(http, messages=chat) for chat in chats]
    for fields in ({"messages": chats}, {"input": chats}):
        status, made = await post(http, "/v1/embeddings", model="tests/vectors", **fields)
        assert status == 200, made
        found = [np.array(each["embedding"]) for each in made["data"]]
        assert np.allclose(found, alone, atol=1e-4) and not np.allclose(found[0], found[1], atol=1e-2)
    assert np.allclose(await vector(http, input=PICTURE), alone[0], atol=1e-4)
    status, made = await post(http, "/pooling", model="tests/vectors", messages=chats[:2], task="embed")
    assert status == 200 and np.allclose([each["data"] for each in made["data"]], alone[:2], atol=1e-4)


async def test_the_last_message_may_be_left_open(http):
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "a circle"}]
    tokens = {"model": "tests/vectors", "messages": messages, "add_generation_prompt": False}
    status, opened = await post(http, "/tokenize", **tokens, continue_final_message=True)
    assert status == 200, opened
    found = await vector(http, messages=messages, continue_final_message=True)
    assert np.allclose(found, await vector(http, input=opened["tokens"]), atol=1e-4)
    assert not np.allclose(found, await vector(http, messages=messages), atol=1e-3)


async def test_a_prefix_is_continued_as_a_final_message_is(http):
    """Mistral's and DeepSeek's clients ask for it in the message itself."""
    begun = {"role": "assistant", "content": "A red"}
    asked = {"model": "pocket", "temperature": 0, "max_tokens": 6}
    prefix, path = {**begun, "prefix": True}, "/v1/chat/completions"
    status, found = await post(http, path, **asked, messages=[*PICTURE, prefix])
    _, wanted = await post(http, path, **asked, messages=[*PICTURE, begun], continue_final_message=True)
    assert status == 200 and found["choices"] == wanted["choices"]
    count = found["usage"]["prompt_tokens"]
    _, plain = await post(http, path, **asked, messages=[*PICTURE, {**begun, "prefix": False}])
    assert plain["usage"]["prompt_tokens"] > count
    _, tokens = await post(http, "/tokenize", model="pocket", messages=[*PICTURE, prefix])
    assert tokens["count"] == count
    for messages, index in (
        ([prefix, *PICTURE], 0),
        ([*PICTURE, {"role": "user", "content": "a", "prefix": True}], 1),
        ([*PICTURE, {**begun, "prefix": "A"}], 1),
    ):
        status, made = await post(http, path, model="pocket", messages=messages)
        assert (status, made["error"]["param"]) == (400, f"messages[{index}].prefix")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"messages": PICTURE, "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"messages": PICTURE, "add_special_tokens": True}, "add_special_tokens"),
        ("/v1/embeddings", {"input": [PICTURE], "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"messages": []}, "messages"),
        ("/v1/embeddings", {"messages": [[]]}, "messages"),
        ("/v1/embeddings", {"messages": [PICTURE, []]}, "messages[1]"),
        ("/v1/embeddings", {"messages": [PICTURE, [{"role": "robot"}]]}, "messages[1][0].role"),
        ("/v1/embeddings", {"input": [PICTURE, [{"role": "user", "content": 3}]]}, "input[1][0].content"),
        (
            "/v1/embeddings",
            {
                "messages": [
                    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]
                ]
            },
            "messages[0][0].content[0].image_url.url",
        ),
        ("/v1/embeddings", {"messages": [[{"role": "user", "content": "word " * 2000}]]}, "messages[0]"),
        ("/v1/embeddings", {"input": "a", "normalize": True, "use_activation": False}, "use_activation"),
        (
            "/pooling",
            {"messages": PICTURE, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/tokenize", {"messages": PICTURE, "add_special_tokens": True}, "add_special_tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "use_activation": False}, "use_activation"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "use_activation": False}, "use_activation"),
        (
            "/v1/rerank",
            {
                "query": "a",
                "documents": [{"content": PICTURE[0]["content"]}],
                "mm_processor_kwargs": {"x": 1},
            },
            "mm_processor_kwargs.x",
        ),
    ],
)
async def test_what_is_refused_is_named(http, path, fields, param):
    status, made = await post(http, path, model="tests/vectors", **fields)
    assert (status, made["error"]["param"]) == (400, param), made


async def test_texts_of_pairs_are_cut_to_as_many_tokens_as_were_asked_for(http):
    _, made = await post(http, "/tokenize", model="tests/vectors", prompt="a red circle and a blue square")
    _, short = await post(http, "/detokenize", model="tests/vectors", tokens=made["tokens"][:3])
    long, short = "a red circle and a blue square", short["prompt"]
    assert long.startswith(short) and len(short) < len(long)

    async def ranks(query: str, documents: list, **fields):
        asked = {"query": query, "documents": documents, **fields}
        status, found = await post(http, "/v1/rerank", model="tests/vectors", **asked)
        assert status == 200, found
        return sorted(found["results"], key=lambda each: each["index"]), found["usage"]["prompt_tokens"]

    documents = [long, {"text": long}, "a", {"content": PICTURE[0]["content"]}]
    cut, count = await ranks(long, documents, max_tokens_per_query=3, max_tokens_per_doc=3)
    wanted, fewer = await ranks(short, [short, short, "a", documents[3]])
    scores = [each["relevance_score"] for each in wanted]
    assert [each["relevance_score"] for each in cut] == pytest.approx(scores, abs=1e-4) and count == fewer
    # The documents are given back as they came.
    assert cut[0]["document"]["text"] == long
    whole, _ = await ranks(long, documents)
    assert whole[2]["relevance_score"] != pytest.approx(scores[2], abs=1e-3)
    pair = {"text_1": long, "text_2": [long, "a"]}
    _, made = await post(http, "/v1/score", model="tests/vectors", **pair, max_tokens_per_doc=3)
    _, other = await post(http, "/v1/score", model="tests/vectors", text_1=long, text_2=[short, "a"])
    found = [each["score"] for each in made["data"]]
    assert found == pytest.approx([each["score"] for each in other["data"]], abs=1e-4)
    # A character of several tokens is kept or left out whole, and a text is never empty.
    limits = {"max_tokens_per_query": 2, "max_tokens_per_doc": 4}
    cut, _ = await ranks("日", ["é日", "a\ufffdb"], **limits)
    wanted, _ = await ranks("日", ["é", "a\ufffd"])
    assert [each["relevance_score"] for each in cut] == pytest.approx(
        [each["relevance_score"] for each in wanted], abs=1e-4
    )


async def test_scored_images_follow_the_processors_options(http):
    pair = {"text_1": "a red circle", "text_2": {"content": PICTURE[0]["content"]}}

    async def tokens(**fields) -> int:
        status, made = await post(http, "/v1/score", model="tests/vectors", **pair, **fields)
        assert status == 200, made
        return made["usage"]["prompt_tokens"]

    assert await tokens(mm_processor_kwargs={"max_pixels": 56 * 56}) < await tokens()
