"""Replicas that die."""

import os
import signal

import openai
import pytest
import ray

from tests.deployments.pictures import ask, circle, square
from tests.serving import answers, wait_for

pytestmark = pytest.mark.ray


def replica_pids(name: str) -> list[int]:
    """Process ids of a deployment's living replicas."""
    from ray.util.state import list_actors  # noqa: F401

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


def test_a_language_model_that_dies_in_mid_stream(served, ray_client):
    stream = ray_client.chat.completions.create(
        model="pocket",
        messages=ask("What shape is this?", square("blue")),
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    kill("LanguageModel")
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "unavailable" and "try again" in caught.value.message
    wait_for(lambda: answers(f"{served.root}/health"))
    assert "red" in color(ray_client)


def test_a_language_model_that_dies_before_the_answer(served, ray_client):
    import threading

    caught: list[openai.APIStatusError] = []

    def ask_long() -> None:
        try:
            ray_client.chat.completions.create(
                model="pocket",
                messages=[{"role": "user", "content": "Hello!"}],
                max_tokens=900,
                extra_body={"ignore_eos": True},
            )
        except openai.APIStatusError as error:
            caught.append(error)

    thread = threading.Thread(target=ask_long)
    thread.start()
    wait_for(lambda: served.engine_metrics()["running"] == 1)
    kill("LanguageModel")
    thread.join(60)
    assert caught and caught[0].status_code == 503
    assert caught[0].body["type"] == "server_error" and caught[0].body["code"] == "unavailable"
    assert caught[0].response.headers["retry-after"]
    wait_for(lambda: answers(f"{served.root}/health"))
    assert "red" in color(ray_client)


@pytest.mark.parametrize("stage", ["Preprocessor", "VisionEncoder"])
def test_a_media_stage_that_died_is_waited_for(served, ray_client, stage):
    """Nothing was delivered yet, and the pictures' sources are still there: the request is served late."""
    kill(stage)
    assert "red" in color(ray_client)
    wait_for(lambda: len(replica_pids(stage)) == 1)
    served.wait_until_idle()
