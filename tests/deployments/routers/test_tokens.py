"""Tokenization, and the small endpoints."""

import gzip
import json
import zlib

import pytest

from tests.deployments.pictures import ask, circle

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]


async def post(http, path: str, **body):
    response = await http.post(path, json={"model": "pocket", **body})
    return response.status_code, response.json()


async def test_text_to_ids_and_back(http):
    _, made = await post(http, "/tokenize", prompt="a red circle", return_token_strs=True)
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"]) and made["max_model_len"] == 1024
    assert "".join(made["token_strs"]) == "a red circle"
    assert await post(http, "/detokenize", tokens=made["tokens"]) == (200, {"prompt": "a red circle"})


async def test_a_conversation_has_the_ids_that_its_answer_counts(http, client):
    messages = ask("What color is the circle?", circle("red"))
    asked = await client.chat.completions.create(model="pocket", messages=messages, max_tokens=1)
    _, made = await post(http, "/tokenize", messages=messages)
    assert made["count"] == asked.usage.prompt_tokens
    _, longer = await post(http, "/tokenize", messages=messages, add_generation_prompt=False)
    assert longer["count"] < made["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/detokenize", {"tokens": [10**7]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_what_is_refused(http, path, body, param):
    status, made = await post(http, path, **body)
    assert status == 400 and made["error"]["param"] == param, made


async def test_small_endpoints(http):
    assert (await http.get("/ping")).status_code == 200
    assert (await http.get("/version")).json()["version"]
    assert (await http.get("/load")).json() == {"server_load": 0}


async def test_head_and_slashes(http):
    whole = await http.get("/v1/models")
    for path in ("/v1/models", "/v1/models/"):
        head = await http.head(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == whole.headers["content-length"]
    assert (await http.get("/v1/models/")).json() == whole.json()
    assert (await http.post("/tokenize/", json={"model": "pocket", "prompt": "a"})).status_code == 200


async def test_a_base_url_without_its_version_gets_a_hint(http):
    response = await http.post("/chat/completions", json={"model": "pocket", "messages": HELLO})
    assert response.status_code == 404
    assert "Did you mean /v1/chat/completions?" in response.json()["error"]["message"]
    other = await http.post("/nothing", json={})
    assert other.status_code == 404 and "mean" not in other.json()["error"]["message"]


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_body(http, encoding, encode):
    body = json.dumps({"model": "pocket", "prompt": "a red circle"}).encode()

    async def send(data: bytes, name: str = encoding):
        headers = {"Content-Type": "application/json", "Content-Encoding": name}
        return await http.post("/tokenize", content=data, headers=headers)

    assert (await send(encode(body))).json()["count"] > 0
    assert (await send(body)).status_code == 400
    assert (await send(encode(body)[:-9])).status_code == 400
    assert (await send(body, "br")).status_code == 400
    # Small as it is sent, and larger than a body may be.
    bomb = await send(encode(b" " * (70 << 20)))
    assert bomb.status_code == 413 and bomb.json()["error"]["code"] == "request_too_large"
