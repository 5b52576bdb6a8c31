"""The application through real Ray: one chat in every form, a client that leaves, references."""

import base64
import http.client
import json
import re
import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deployments.pictures import ask, circle, data_url, square
from tests.engine.media.pdfs import page, pdf
from tests.serving import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_idle_afterwards")]


def test_a_chat_streamed_and_whole(ray_client):
    asked = {
        "model": "pocket",
        "messages": ask("Do both pictures show the same color?", circle("red"), circle("blue")),
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = ray_client.chat.completions.create(**asked)
    chunks = list(ray_client.chat.completions.create(**asked, stream=True))
    assert whole.choices[0].message.content == "No, first red, then blue."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "No, first red, then blue."


def test_a_long_item_of_a_stream_and_a_vector(ray_client):
    made = ray_client.chat.completions.create(
        model="pocket",
        messages=ask("What shape is this?", square("blue")),
        max_tokens=1,
        extra_body={"prompt_logprobs": 2},
    )
    assert len(made.model_extra["prompt_logprobs"]) == made.usage.prompt_tokens
    body = {"model": "tests/vectors", "messages": ask("What is this?", circle("red"))}
    vector = ray_client.post("/embeddings", body=body, cast_to=openai.types.CreateEmbeddingResponse)
    assert len(vector.data[0].embedding) == 256


def test_an_image_is_named_by_its_uuid(ray_client):
    """The replica's files travel by reference, and come back with a later request."""

    def answer(**image) -> str:
        (message,) = ask("What shape is this?")
        message["content"].insert(0, {"type": "image_url", "uuid": "a square", **image})
        made = ray_client.chat.completions.create(
            model="pocket", messages=[message], max_tokens=12, temperature=0
        )
        return made.choices[0].message.content

    with pytest.raises(openai.NotFoundError, match="'a square'"):
        answer(image_url=None)
    first = answer(image_url={"url": data_url(square("purple"))})
    assert "square" in first and answer(image_url=None) == first
    with pytest.raises(openai.ConflictError):
        answer(image_url={"url": data_url(square("red"))})


def test_pages_of_a_document_are_spread_over_calls(ray_client):
    """The replica that opens a document hands its bytes to the others by reference."""
    data = pdf([page(f"page {number}", size=(150, 120)) for number in range(3)])
    address = "data:application/pdf;base64," + base64.b64encode(data).decode()
    (message,) = ask("What shape is this?")
    for part in (
        {"type": "file", "file": {"file_data": address, "dpi": 72}},
        {"type": "document_url", "document_url": address, "uuid": "a document", "dpi": 72},
        {"type": "document_url", "uuid": "a document", "dpi": 72},
    ):
        made = ray_client.chat.completions.create(
            model="pocket",
            messages=[message | {"content": [part, *message["content"]]}],
            max_tokens=4,
            extra_body={"include_timings": True},
        )
        assert [(item["width"], item["height"]) for item in made.usage.media] == [(150, 120)] * 3


@pytest.mark.parametrize(
    ("change", "param"),
    [
        # Refused by the ingress, by the preprocessor, and by the language model whole and streamed.
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,a"}]}]}, "url"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}, "stream": True}, "logit_bias"),
    ],
)
def test_a_refusal_of_each_stage_is_one_line_of_the_log(served, ray_client, change, param):
    before = len(served.log.read_text())
    body = {"model": "pocket", "messages": ask("What shape is this?", square("blue"))} | change
    with pytest.raises(openai.BadRequestError) as caught:
        ray_client.post("/chat/completions", body=body, cast_to=object)
    assert param in caught.value.param
    # Lines of other processes arrive a moment later.
    wait_for(lambda: "POST /v1/chat/completions: 400 " in served.log.read_text()[before:])
    assert not re.search("Traceback|ERROR", served.log.read_text()[before:])


def test_the_log_says_when_the_server_is_ready_and_has_one_line_for_a_request(served, ray_client):
    ready = f"ready at {served.root}: pocket (generate, CPU, context of 1024 tokens); tests/vectors (embed"
    wait_for(lambda: ready in served.log.read_text())
    before = len(served.log.read_text())
    made = ray_client.chat.completions.with_raw_response.create(
        model="pocket", messages=ask("What shape is this?", square("blue")), max_tokens=4
    )
    id = made.headers["x-request-id"]
    assert "," not in id
    wait_for(lambda: f"request_id={id}" in served.log.read_text()[before:])
    lines = [line for line in served.log.read_text()[before:].splitlines() if "chat/completions" in line]
    assert len(lines) == 1 and re.search(r": 200 .* model=pocket .* images=1 fetch_ms=[\d.]+ ", lines[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_at_once(served, stream):
    """Far more tokens are asked for than the test would wait for."""
    body = {
        "model": "pocket",
        "messages": ask("What color is the circle?", circle("red")),
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": stream,
    }
    before, logged = served.engine_metrics()["output_tokens"], len(served.log.read_text())
    connection = http.client.HTTPConnection(served.root.removeprefix("http://"))
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    wait_for(lambda: served.engine_metrics()["running"] == 1)
    connection.sock.shutdown(2)
    connection.close()
    wait_for(lambda: served.engine_metrics()["running"] == 0)
    served.wait_until_idle()
    assert served.engine_metrics()["output_tokens"] - before < 900
    line = "200 the client left before its end" if stream else "the client left"
    wait_for(lambda: f"POST /v1/chat/completions: {line} request_id=" in served.log.read_text()[logged:])
    assert not re.search("Traceback|ERROR", served.log.read_text()[logged:])


def stored_objects(served) -> int:
    """Objects in the object stores of the cluster."""
    from ray._private.internal_api import memory_summary

    found = re.search(
        r"Plasma memory usage \d+ MiB, (\d+) objects", memory_summary(served.cluster, stats_only=True)
    )
    assert found is not None
    return int(found[1])


def test_pixels_and_embeddings_leave_the_object_store(served, ray_client):
    def once(width: int) -> None:
        ray_client.chat.completions.create(
            model="pocket",
            messages=ask("What color is the circle?", circle("red", (width, 160))),
            max_tokens=4,
        )

    once(200)
    before = stored_objects(served)
    for width in range(201, 213):
        once(width)
    # Counting is distributed: owners hear of the last use a moment later.
    wait_for(lambda: stored_objects(served) <= before)


def test_one_scrape_has_the_metrics_of_all_replicas(served, ray_client):
    def scrape() -> dict[tuple[str, ...], float]:
        with urllib.request.urlopen(f"{served.root}/metrics", timeout=30) as response:
            text = response.read().decode()
        return {
            (sample.name, sample.labels.get("model", ""), sample.labels.get("stage", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("outcome") in (None, "ok")
        }

    before = scrape()
    ray_client.chat.completions.create(
        model="pocket", messages=ask("What color is the circle?", circle("red")), max_tokens=4
    )
    after = scrape()
    assert (
        after["sightline_answers_total", "pocket", ""] == before["sightline_answers_total", "pocket", ""] + 1
    )
    for stage in ("preprocessor", "encoder", "language_model"):
        requests = "sightline_stage_requests_total", "pocket", stage
        assert after[requests] == before[requests] + 1
        assert after["sightline_stage_replicas", "pocket", stage] == 1
    assert after["sightline_engine_requests_finished_total", "tests/vectors", "language_model"] >= 0
