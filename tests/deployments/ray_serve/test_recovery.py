"""Replicas that die. Of the stages ``tests/chaos/test_short.py`` kills each one under load."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.chaos.victims import replica_pids
from tests.deployments.pictures import ask, circle, square
from tests.serving import wait_for

pytestmark = pytest.mark.ray


def kill(served, deployment: str) -> None:
    (pid,) = replica_pids(served, deployment)
    os.kill(pid, signal.SIGKILL)


def color(ray_client) -> str:
    made = ray_client.chat.completions.create(
        model="pocket",
        messages=ask("What color is the circle?", circle("red")),
        max_tokens=20,
        temperature=0,
    )
    return made.choices[0].message.content


@pytest.mark.wide
def test_a_language_model_that_dies_goes_unseen(served, ray_client):
    """A stream and a whole answer of one image go on where they were, once the only replica is back."""
    image = {"messages": ask("What shape is this?", square("blue")), "temperature": 0}
    hello = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 1.0, "seed": 5, "n": 2}
    # Far more than is computed until the engine is killed.
    common = {"model": "pocket", "max_tokens": 600, "extra_body": {"ignore_eos": True}}

    def whole(asked: dict) -> list[str]:
        made = ray_client.chat.completions.create(**common, **asked)
        assert made.usage.completion_tokens == 600 * len(made.choices)
        return [choice.message.content for choice in made.choices]

    with ThreadPoolExecutor(2) as pool:
        wanted = list(pool.map(whole, (image, hello)))
    stream = ray_client.chat.completions.create(**common, **image, stream=True)
    parts = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(whole, hello)
        wait_for(lambda: served.engine_metrics()["running"] == 3)
        kill(served, "LanguageModel:pocket")
        parts += stream
        assert other.result(300) == wanted[1]
    text = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
    assert [text] == wanted[0]
    assert [c.finish_reason for part in parts for c in part.choices if c.finish_reason] == ["length"]
    assert "red" in color(ray_client)
    served.wait_until_idle()


@pytest.mark.wide
@pytest.mark.parametrize("stage", ["Preprocessor", "VisionEncoder"])
def test_a_media_stage_that_died_is_waited_for(served, ray_client, stage):
    """No output was sent yet, and the sources of the images are still there: the request is served late."""
    kill(served, f"{stage}:pocket")
    assert "red" in color(ray_client)
    wait_for(lambda: len(replica_pids(served, f"{stage}:pocket")) == 1)
    served.wait_until_idle()


def test_openai_s_client_asks_again_when_the_ingress_has_died(served):
    """Its own retries are enough: the answer of a dead ingress is a server error or a broken connection."""
    client = openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=60)
    asked = {"model": "pocket", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}

    def whole() -> str:
        made = client.chat.completions.create(**asked, max_tokens=200, extra_body={"ignore_eos": True})
        return made.choices[0].message.content

    wanted = whole()
    (ingress,) = replica_pids(served, "Ingress")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(whole)
        wait_for(lambda: served.engine_metrics()["running"] == 1)
        os.kill(ingress, signal.SIGKILL)
        assert answer.result(500) == wanted
    served.wait_until_idle()
