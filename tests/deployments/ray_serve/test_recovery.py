"""Replicas that die."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import ray

from tests.deployments.pictures import ask, circle, square
from tests.serving import answers, wait_for

pytestmark = pytest.mark.ray


def replica_pids(name: str) -> list[int]:
    """Process ids of a deployment's living replicas."""
    controller = ray.serve.context._get_global_client()._controller
    details = ray.get(controller.get_serve_instance_details.remote())
    replicas = details["applications"]["sightline"]["deployments"][f"{name}:pocket"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING" and replica["pid"]]


def kill(name: str) -> None:
    (pid,) = replica_pids(name)
    os.kill(pid, signal.SIGKILL)


def color(ray_client) -> str:
    made = ray_client.chat.completions.create(
        model="pocket",
        messages=ask("What color is the circle?", circle("red")),
        max_tokens=20,
        temperature=0,
    )
    return made.choices[0].message.content


def test_a_language_model_that_dies_ends_a_stream_and_a_whole_answer(served, ray_client):
    asked = {"model": "pocket", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    messages = ask("What shape is this?", square("blue"))
    stream = ray_client.chat.completions.create(**asked, messages=messages, stream=True)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(
            ray_client.chat.completions.create, **asked, messages=[{"role": "user", "content": "Hello!"}]
        )
        wait_for(lambda: served.engine_metrics()["running"] == 2)
        kill("LanguageModel")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "unavailable" and "try again" in caught.value.message
        failure = whole.exception(60)
    assert isinstance(failure, openai.APIStatusError) and failure.status_code == 503
    assert failure.body["type"] == "server_error" and failure.body["code"] == "unavailable"
    assert failure.response.headers["retry-after"]
    wait_for(lambda: answers(f"{served.root}/health"))
    assert "red" in color(ray_client)


@pytest.mark.parametrize("stage", ["Preprocessor", "VisionEncoder"])
def test_a_media_stage_that_died_is_waited_for(served, ray_client, stage):
    """No output was sent yet, and the sources of the images are still there: the request is served late."""
    kill(stage)
    assert "red" in color(ray_client)
    wait_for(lambda: len(replica_pids(stage)) == 1)
    served.wait_until_idle()
