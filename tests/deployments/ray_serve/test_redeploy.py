"""Changes of the configuration while requests come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest
import yaml
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.deployments.pictures import ask, circle, looking_at, silent_image
from tests.metrics import all_answer, is_idle, scraped
from tests.serving import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_idle_afterwards")]


class Controller:
    """The controller of the cluster that runs the application.

    Args:
        file: the configuration that runs.

    Attributes:
        config: the configuration, to be changed.
    """

    def __init__(self, file: Path) -> None:
        self._client, self._file = _get_global_client(), file
        self.reset()

    def reset(self) -> None:
        """Undo all changes of ``config`` since the last :meth:`keep`."""
        self.config = yaml.safe_load(self._file.read_text())

    def keep(self) -> None:
        """Make ``config`` the one that runs between the tests, so that nothing has to be replaced again."""
        self._file.write_text(yaml.safe_dump(self.config))

    def deploy(self) -> None:
        self._client.deploy_apps(ServeDeploySchema.model_validate(self.config), _blocking=False)

    def deployments(self) -> dict[str, dict[str, Any]]:
        """What Serve says of each deployment; empty while an application is being updated."""
        applications = self._client.get_serve_details()["applications"]
        statuses = {application["status"] for application in applications.values()}
        assert "DEPLOY_FAILED" not in statuses
        if statuses != {"RUNNING"}:
            return {}
        return {name: each for app in applications.values() for name, each in app["deployments"].items()}

    def states(self, deployment: str) -> set[str]:
        """The states of the replicas of all deployments of that name, also while an application is being
        updated."""
        applications = self._client.get_serve_details()["applications"].values()
        found = [app["deployments"][deployment] for app in applications if deployment in app["deployments"]]
        return {replica["state"] for each in found for replica in each["replicas"]}

    def replicas(self) -> dict[str, set[str]]:
        """The replicas of each deployment; empty while any of them starts or stops."""
        found = self.deployments()
        states = {replica["state"] for each in found.values() for replica in each["replicas"]}
        if states != {"RUNNING"}:
            return {}
        return {name: {replica["replica_id"] for replica in each["replicas"]} for name, each in found.items()}


@pytest.fixture
def controller(served) -> Iterator[Controller]:
    """The configuration of the session runs again afterwards, with the changes that the test keeps."""
    made = Controller(served.config)
    before = wait_for(made.replicas)
    yield made
    made.reset()
    made.deploy()
    counts = dict.fromkeys(before, 1)
    wait_for(lambda: {name: len(replicas) for name, replicas in made.replicas().items()} == counts)


def during(client: openai.OpenAI, change: Callable[[], None], until: Callable[[], bool]) -> list[Any]:
    """Change the configuration while requests come, until it has come true. Every request must be answered;
    their distinct answers.

    Requests pause between each other, or the replicas that start would hardly get any of two cores.
    """
    done = Event()
    chat = {
        "model": "pocket",
        "messages": ask("What shape is this?", circle("red")),
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }

    def whole() -> str:
        return client.chat.completions.create(**chat).choices[0].message.content

    def streamed() -> str:
        parts = client.chat.completions.create(**chat, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts)

    def vector() -> str:
        return str(client.embeddings.create(model="tests/vectors", input="a red circle").data[0].embedding)

    def keep_asking(ask_once: Callable[[], str]) -> set[str]:
        found = {ask_once()}
        while not done.wait(0.5):
            found.add(ask_once())
        # Once more with the changed configuration.
        return found | {ask_once()}

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, each) for each in (whole, streamed, vector)]
        try:
            change()
            wait_for(lambda: until() or any(each.done() for each in asking))
        finally:
            done.set()
        chats, streams, vectors = (each.result() for each in asking)
    assert until()
    return [*(chats | streams), *vectors]


def test_counts_and_values_change_in_running_replicas(served, ray_client, controller):
    before = wait_for(controller.replicas)
    controller.config["applications"][0]["deployments"] = [
        {"name": "Ingress", "user_config": {"max_body_bytes": 20000}},
        {"name": "Preprocessor:pocket", "num_replicas": 2, "user_config": {"threads": 1}},
        {"name": "VisionEncoder:pocket", "user_config": {"duty_cycle": 0.9}},
        {"name": "LanguageModel:pocket", "max_ongoing_requests": 300, "user_config": {"no": "such value"}},
    ]
    wanted = {name: 1 + (name == "Preprocessor:pocket") for name in before}
    answers = during(
        ray_client,
        controller.deploy,
        lambda: {name: len(ids) for name, ids in controller.replicas().items()} == wanted,
    )
    assert len(answers) == 2
    after = controller.replicas()
    assert all(before[name] <= after[name] for name in before), "a replica was replaced"
    with pytest.raises(openai.APIStatusError) as caught:
        ray_client.completions.create(model="pocket", prompt="word " * 5000)
    assert caught.value.status_code == 413
    # Options that were not named are still those of the application.
    routers = {
        name: deployment["deployment_config"]["request_router_config"]["request_router_class"]
        for name, deployment in controller.deployments().items()
    }
    assert routers["LanguageModel:pocket"].endswith("LanguageModelRouter")
    assert routers["VisionEncoder:pocket"].endswith("EncoderRouter")
    # The wrong value is refused in words, and ends nothing.
    wait_for(lambda: "'no' can't change while a replica runs" in served.log.read_text())


def test_the_end_of_a_request_s_time_ends_the_work(served, controller):
    """Here, because only a change of the configuration sets a time."""

    def timed_out(stage: str) -> float:
        values = scraped(served.root)
        return values("stage_requests_total", model="pocket", stage=stage, outcome="cancelled")

    def ends(body: dict[str, Any]) -> bool:
        try:
            answer = httpx.post(f"{served.base_url}/chat/completions", json=body, timeout=8)
        except httpx.TimeoutException:
            # The change has not come yet, and the image itself may take longer.
            return False
        return answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"

    def ends_the_work(body: dict[str, Any], stage: str) -> None:
        wait_for(lambda: ends(body))
        # Clients that left while the change was on its way count as well.
        wait_for(lambda: is_idle(scraped(served.root)))
        before = timed_out(stage)
        wait_for(lambda: ends(body))
        wait_for(lambda: timed_out(stage) > before)
        wait_for(lambda: is_idle(scraped(served.root)))

    wait_for(lambda: all_answer(scraped(served.root)))
    user_config = {"request_timeout_s": 2}
    controller.config["applications"][0]["deployments"] = [{"name": "Ingress", "user_config": user_config}]
    controller.deploy()
    with silent_image(served) as url:
        ends_the_work({"model": "pocket", "messages": looking_at(url)}, "preprocessor")
    # Far more tokens than are made in two seconds.
    long = {"max_tokens": 900, "ignore_eos": True, "temperature": 1, "n": 64}
    hello = [{"role": "user", "content": "Hello!"}]
    ends_the_work({"model": "pocket", "messages": hello, **long}, "language_model")


def test_a_model_with_an_application_of_its_own_is_replaced_alone(served, ray_client, controller):
    before = wait_for(controller.replicas)
    others = {name: ids for name, ids in before.items() if not name.endswith("tests--vectors")}
    assert 0 < len(others) < len(before)
    (model,) = controller.config["applications"][1]["args"]["models"]
    model["engine"] |= {"max_num_seqs": 200, "max_model_len": 640}

    def pool(tokens: int) -> int:
        found = ray_client.embeddings.create(model="tests/vectors", input=[[5] * tokens])
        return found.usage.prompt_tokens

    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        pool(600)

    def replaced() -> bool:
        found = controller.replicas()
        return bool(found) and all(not found[name] & before[name] for name in before.keys() - others.keys())

    answers = during(ray_client, controller.deploy, replaced)
    assert len(answers) == 2
    after = controller.replicas()
    assert {name: after[name] for name in others} == others, "another model's replica was replaced"
    # The ingress that goes on learns what the new replicas hold.
    assert pool(600) == 600
    with pytest.raises(openai.BadRequestError, match="maximum context length is 640"):
        pool(641)
    controller.keep()
