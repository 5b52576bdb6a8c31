"""Embedding rows over HTTP, in parts of the type ``image_embeds``."""

import base64
import io
import json
import pickle
import struct

import httpx
import pytest
import pytest_asyncio
import torch
from safetensors.torch import save

from deployments.api import create_api
from deployments.config import AppConfig, IngressConfig
from deployments.pipeline import Pipeline
from engine.media.source import MediaSource
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import circle, data_url
from tests.serving import app_args

pytestmark = pytest.mark.usefixtures("idle_afterwards")

WHERE = "messages[0].content[0].image_embeds"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def made(running) -> tuple[torch.Tensor, list[int]]:
    """Rows and grid of a purple circle, as the stages make them."""
    source = MediaSource(0, "image", url=data_url(circle("purple")))
    (pixels,) = await running.pocket.preprocessor.prepare([source])
    embedded = await running.pocket.encoder.encode(pixels, "", 0.0)
    return torch.from_numpy(embedded.rows.copy()), list(pixels.item.grid)


@pytest_asyncio.fixture(loop_scope="session")
async def post(running):
    """Sends a conversation about a part to a server that takes embeddings; gives the response."""
    usual = running.app.api.state.pipelines["pocket"]
    spec = AppConfig.model_validate(app_args()).models[0].model_copy(update={"image_embeds": True})
    taking = Pipeline(spec, running.pocket.stages, usual._threads)
    api = create_api(IngressConfig(), {"pocket": taking})
    http = httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)

    async def send(part: dict, client=http):
        text = {"type": "text", "text": "What color is the circle?"}
        body = {"model": "pocket", "messages": [{"role": "user", "content": [part, text]}], "temperature": 0}
        return await client.post(
            "/v1/chat/completions", json=body | {"max_tokens": 8, "include_timings": True}
        )

    return send


def part(file: bytes, grid, **fields) -> dict:
    return {
        "type": "image_embeds",
        "image_embeds": {"image_embeds": encoded(file), "image_grid_thw": grid},
        **fields,
    }


def answer(response) -> tuple[str, int]:
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
async def test_rows_answer_as_their_image_does(post, made, dtype):
    rows, grid = made
    image = await post({"type": "image_url", "image_url": {"url": data_url(circle("purple"))}})
    assert "purple" in answer(image)[0]
    for tensor, described in ((rows, grid), (rows[None], [grid])):
        given = await post(part(save({"rows": tensor.to(dtype)}), described))
        assert answer(given) == answer(image)
        (seen,) = given.json()["usage"]["media"]
        assert (seen["tokens"], seen["encode_ms"]) == (len(rows), 0)


async def test_rows_have_uuids_too(post, made):
    rows, grid = made
    first = await post(part(save({"rows": rows}), grid, uuid="rows"))
    for named in ({"image_embeds": None}, {}, {"image_embeds": {"image_embeds": None}}):
        assert answer(await post({"type": "image_embeds", "uuid": "rows", **named})) == answer(first)
    other = await post(part(save({"rows": rows + 1}), grid, uuid="rows"))
    assert other.status_code == 409


async def test_a_server_takes_no_rows_unless_it_is_told_to(post, made, http):
    rows, grid = made
    refused = await post(part(save({"rows": rows}), grid), http)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == f"{WHERE}.image_embeds"
    assert "image_embeds: true" in error["message"]


def changed(file: bytes, **entry) -> bytes:
    """``file`` with other values in its tensor's entry of the header."""
    length = struct.unpack_from("<Q", file)[0]
    header = json.loads(file[8 : 8 + length])
    header["rows"] |= entry
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + file[8 + length :]


class Trap:
    """Would run code where a pickle of it is read."""

    def __reduce__(self):
        return pytest.fail, ("a file of a caller was unpickled",)


def saved_by_torch(rows) -> bytes:
    file = io.BytesIO()
    torch.save({"rows": rows, "trap": Trap()}, file)
    return file.getvalue()


BAD_FILES = {
    "no base64": (lambda rows: None, "not valid base64"),
    "torch.save": (saved_by_torch, "safetensors"),
    "pickle": (lambda rows: pickle.dumps(Trap()) + bytes(64), "safetensors"),
    "nothing": (lambda rows: b"", "safetensors"),
    "short": (lambda rows: b"abc", "no safetensors"),
    "long header": (lambda rows: struct.pack("<Q", 1 << 62) + bytes(100), "no safetensors"),
    "no JSON": (lambda rows: struct.pack("<Q", 4) + b"abcd", "one tensor"),
    "two tensors": (lambda rows: save({"a": rows, "b": rows.clone()}), "one tensor"),
    "integers": (lambda rows: save({"rows": rows.to(torch.int32)}), "one tensor of float32"),
    "doubles": (lambda rows: save({"rows": rows.double()}), "one tensor of float32"),
    "cut off": (lambda rows: save({"rows": rows})[:-12], "doesn't fit the tensor"),
    "longer": (lambda rows: save({"rows": rows}) + bytes(12), "doesn't fit the tensor"),
    "other shape": (lambda rows: changed(save({"rows": rows}), shape=[1 << 40, 1 << 40]), "doesn't fit"),
    "negative shape": (lambda rows: changed(save({"rows": rows}), shape=[-1, -1]), "one tensor"),
    "offsets": (lambda rows: changed(save({"rows": rows}), data_offsets=[4, rows.nbytes + 4]), "doesn't fit"),
    "too few rows": (lambda rows: save({"rows": rows[1:].clone()}), "a row for each placeholder"),
    "too wide": (lambda rows: save({"rows": torch.cat([rows, rows], 1)}), "a row for each placeholder"),
    "flat": (lambda rows: save({"rows": rows.reshape(-1)}), "a row for each placeholder"),
    "NaN": (lambda rows: save({"rows": rows.index_fill(0, torch.tensor([1]), float("nan"))}), "not finite"),
    "infinite bfloat16": (
        lambda rows: save({"rows": rows.index_fill(1, torch.tensor([2]), -float("inf")).bfloat16()}),
        "not finite",
    ),
    "NaN of float16": (
        lambda rows: save({"rows": rows.index_fill(1, torch.tensor([0]), float("nan")).half()}),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
async def test_files_that_are_not_the_models_rows_are_refused(post, made, name):
    rows, grid = made
    make, words = BAD_FILES[name]
    given = part(make(rows) or b"", grid)
    if name == "no base64":
        given["image_embeds"]["image_embeds"] = "!" * 64
    refused = await post(given)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == f"{WHERE}.image_embeds", error
    assert words in error["message"] and error["message"].startswith(error["param"])


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"image_grid_thw": [1, 2]},
        {"image_grid_thw": [1, 0, 4]},
        {"image_grid_thw": [1, True, 4]},
        {"image_grid_thw": [1, 1 << 50, 4]},
        {"image_grid_thw": [1, 4.0, 4]},
        {"image_grid_thw": [[1, 4, 4], [1, 4, 4]]},
        {"image_grid_thw": "gAJ9cQA="},
        {"image_grid_thw": [1, 3, 4]},
        {"image_grid_thw": [1, 4, 4], "image_sizes": [[4, 4]]},
    ],
)
async def test_descriptions_that_name_no_image_are_refused(post, made, description):
    rows, _ = made
    file = encoded(save({"rows": rows}))
    refused = await post({"type": "image_embeds", "image_embeds": {"image_embeds": file, **description}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == f"{WHERE}.image_embeds"


async def test_rows_beyond_the_limit_of_bytes_are_refused_before_they_are_decoded(post):
    # No base64 at all behind the first characters: decoding it would say so.
    refused = await post(part(b"", [1, 4, 4]) | {"image_embeds": "AAAA" + "!" * (45 << 20)})
    assert refused.status_code == 413 and refused.json()["error"]["param"] == WHERE
