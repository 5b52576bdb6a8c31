"""Responses that are kept for several replicas of the ingress; ``test_response_store.py`` needs no Ray."""

from collections.abc import Iterator

import openai
import pytest

from tests.deployments.ray_serve.test_redeploy import Controller
from tests.serving import wait_for

pytestmark = [pytest.mark.wide, pytest.mark.ray, pytest.mark.usefixtures("ray_idle_afterwards")]

#: Requests go to either of two replicas: this many miss one of them once in a hundred million times.
ENOUGH = 27


@pytest.fixture(scope="module")
def controller(shared_applications) -> Iterator[Controller]:
    """An ingress of two replicas, before the stages that run already."""
    served = shared_applications["served"].get()
    controller = Controller(served.config)
    (first, *_) = controller.config["applications"]
    model = {**first["args"]["models"][0], "application": first["name"]}
    args = {**first["args"], "models": [model], "ingress": {"num_replicas": 2}}
    added = {"name": "several", "route_prefix": "/several", "args": args}
    controller.config["applications"].append({"import_path": first["import_path"], **added})
    controller.deploy()
    wait_for(lambda: "Responses" in controller.replicas())
    yield controller
    controller.reset()
    controller.deploy()
    # There are no replicas to be seen while an application is being updated.
    wait_for(lambda: (found := controller.replicas()) and "Responses" not in found)


@pytest.fixture
def several(controller, served) -> openai.OpenAI:
    """A client of that ingress."""
    return openai.OpenAI(base_url=f"{served.root}/several/v1", api_key="none", max_retries=0, timeout=120)


def test_any_replica_knows_a_response(several):
    made = several.responses.create(model="pocket", input="Hello!")
    for _ in range(ENOUGH):
        assert several.responses.retrieve(made.id) == made
    follow = several.responses.create(model="pocket", input="Hello!", previous_response_id=made.id)
    items = list(several.responses.input_items.list(follow.id))
    assert items and follow.usage.input_tokens > made.usage.input_tokens
    several.responses.delete(made.id)
    for _ in range(ENOUGH):
        with pytest.raises(openai.NotFoundError):
            several.responses.retrieve(made.id)
    assert several.responses.retrieve(follow.id) == follow


def test_any_replica_stops_a_response(served, several):
    """Also one that another replica makes: the engine never comes to its end."""
    asked = {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}, "background": True}
    finished = served.engine_metrics()["requests_finished"]
    statuses = []
    for _ in range(6):
        made = several.responses.create(model="pocket", input="Hello!", **asked)
        statuses.append(several.responses.cancel(made.id).status)
        assert several.responses.retrieve(made.id).status == statuses[-1]
        served.wait_until_idle()
    # A response may be complete before it is cancelled.
    assert set(statuses) <= {"cancelled", "completed"} and "cancelled" in statuses
    assert served.engine_metrics()["requests_finished"] - finished == statuses.count("completed")


def test_a_replica_that_leaves_ends_its_responses_first(controller, several):
    """Its clients ask the other one."""
    asked = {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}, "background": True}
    made = [several.responses.create(model="pocket", input=f"Hello {i}!", **asked).id for i in range(8)]
    controller.config["applications"][-1]["deployments"] = [{"name": "Ingress", "num_replicas": 1}]
    controller.deploy()
    wait_for(lambda: "STOPPING" in controller.states("Ingress"))
    assert any(several.responses.retrieve(name).status == "in_progress" for name in reversed(made))
    for name in made:
        wait_for(lambda name=name: several.responses.retrieve(name).status == "incomplete")
    assert wait_for(lambda: len(controller.replicas().get("Ingress", ())) == 1)
