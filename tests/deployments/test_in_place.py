"""Values that running replicas take over."""

import asyncio
import logging
import re

import httpx
import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.utils import DEFAULT
from ray.serve.schema import ServeDeploySchema

from deployments.access import KeyConfig
from deployments.api import create_api, take_over
from deployments.config import AppConfig, IngressConfig, ReplayConfig
from deployments.in_place import InPlace, overlaid
from deployments.ray_serve.ingress import Ingress
from deployments.ray_serve.replicas import LanguageModelReplica, PreprocessorReplica, VisionEncoderReplica
from deployments.stage_config import EncoderConfig, LanguageModelConfig, PreprocessorConfig
from engine.errors import ConfigError
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import ask, circle, square
from tests.serving import ROOT

CHAT = {"model": "pocket", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
STAGES = [IngressConfig, PreprocessorConfig, EncoderConfig, LanguageModelConfig]


def test_a_mapping_changes_the_fields_that_it_names():
    base = IngressConfig(max_active_requests=7, replay={"max_losses": 3, "patience_s": 9})
    changed = overlaid(base, {"replay": {"patience_s": 1}, "page": False})
    assert changed.replay == ReplayConfig(max_losses=3, patience_s=1)
    assert changed.max_active_requests == 7 and not changed.page and base.page
    with pytest.raises(ValidationError, match="patience_s"):
        overlaid(base, {"replay": {"patience_s": -1}})
    with pytest.raises(ValueError, match="'pages' can't change"):
        overlaid(base, {"pages": False})


def test_what_a_configuration_no_longer_names_goes_back_to_the_arguments():
    taken: list[EncoderConfig] = []
    running = InPlace(EncoderConfig(duty_cycle=0.9), EncoderConfig.IN_PLACE, taken.append)
    for user_config in ({"cache_bytes": 5}, {"duty_cycle": 0.5}, {}, None):
        running.take_over(user_config)
    assert [(config.cache_bytes, config.duty_cycle) for config in taken] == [
        (5, 0.9),
        (512 << 20, 0.5),
        (512 << 20, 0.9),
        (512 << 20, 0.9),
    ]


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({"num_gpus": 1}, "'num_gpus' can't change while a replica runs"),
        ({"duty_cycle": 2}, "duty_cycle"),
        ({1: 1, "num_gpus": 1}, "'1' can't change while a replica runs"),
    ],
)
def test_a_wrong_value_is_logged_and_ends_no_replica(user_config, message, caplog):
    taken: list[EncoderConfig] = []
    running = InPlace(EncoderConfig(), EncoderConfig.IN_PLACE, taken.append)
    with caplog.at_level(logging.ERROR, "ray.serve"):
        logging.getLogger("ray.serve").propagate = True
        running.take_over(user_config)
    assert not taken and message in caplog.text


@pytest.mark.parametrize("config", STAGES)
def test_every_field_that_may_change_is_one_of_the_stage_s_own(config):
    assert set(config.model_fields) >= config.IN_PLACE
    # Serve itself changes these in place.
    assert not config.IN_PLACE & {"num_replicas", "autoscaling", "max_ongoing_requests"}
    assert config().options()["user_config"] == {}


@pytest.mark.parametrize(
    "replica", [LanguageModelReplica, PreprocessorReplica, VisionEncoderReplica, Ingress]
)
def test_every_replica_can_be_reconfigured(replica):
    """Serve ends a replica whose class has no such method as soon as there is a ``user_config``."""
    assert asyncio.iscoroutinefunction(replica.reconfigure)


def test_the_page_about_changes_tells_the_truth():
    text = (ROOT / "docs" / "changes.md").read_text()
    listed = {
        row[0]: set(re.findall(r"`(\w+)`", row[1]))
        for row in re.findall(r"^\| `(\w+).*?\| (.*) \|$", text, re.M)
    }
    configs = {"Ingress": IngressConfig, "Preprocessor": PreprocessorConfig, "VisionEncoder": EncoderConfig}
    assert listed == {name: set(config.IN_PLACE) for name, config in configs.items()}
    assert not LanguageModelConfig.IN_PLACE
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for application in ServeDeploySchema.model_validate(yaml.safe_load(block)).applications:
            config = AppConfig.model_validate(application.args)
            for deployment in application.deployments:
                stage = config.ingress if deployment.name == "Ingress" else config.models[0].encoder
                if deployment.user_config != DEFAULT.VALUE:
                    overlaid(stage, deployment.user_config, stage.IN_PLACE)


@pytest.fixture
def api(running):
    made = create_api(IngressConfig(), running.app.api.state.pipelines)
    yield made
    # The pipelines are those of the whole session.
    take_over(made, IngressConfig())


@pytest.fixture
def client(api):
    return httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)


async def test_the_ingress_takes_over_its_bounds(api, client, running):
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    take_over(api, IngressConfig(max_body_bytes=20))
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 413
    take_over(api, IngressConfig(request_timeout_s=0.001))
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 504
    late = await client.post("/v1/messages", json=CHAT)
    assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout_error")
    replay = ReplayConfig(max_losses=1)
    take_over(api, IngressConfig(replay=replay))
    assert api.state.pipelines["pocket"].replay == replay
    await running.wait_until_idle()


async def test_a_lower_limit_ends_no_open_request(api, client, running):
    body = CHAT | {"max_tokens": 300, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.aiter_lines()
        await anext(lines)
        take_over(api, IngressConfig(max_active_requests=1))
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429 and "More than 1 " in refused.text
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    await running.wait_until_idle()


async def test_keys_change_while_requests_of_theirs_are_open(api, client, running):
    def key(secret: str) -> dict:
        return {"headers": {"Authorization": f"Bearer {secret}"}}

    old, new = (KeyConfig(name="team", key=secret, max_active_requests=1) for secret in ("old", "new"))
    assert "security" not in api.openapi()
    take_over(api, IngressConfig(keys=(old,)))
    assert api.openapi()["security"]
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
    body = CHAT | {"max_tokens": 300, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body, **key("old")) as response:
        lines = response.aiter_lines()
        await anext(lines)
        take_over(api, IngressConfig(keys=(new,)))
        assert (await client.post("/v1/chat/completions", json=CHAT, **key("old"))).status_code == 401
        # The open request still counts for its name.
        assert (await client.post("/v1/chat/completions", json=CHAT, **key("new"))).status_code == 429
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert (await client.post("/v1/chat/completions", json=CHAT, **key("new"))).status_code == 200
    with pytest.raises(ConfigError, match="can't be read"):
        take_over(api, IngressConfig(keys=(KeyConfig(name="team", file="/nowhere"),), max_body_bytes=1))
    assert (await client.post("/v1/chat/completions", json=CHAT, **key("new"))).status_code == 200
    await running.wait_until_idle()


async def test_media_stages_take_over_their_values_between_requests(running, client):
    encoder, preprocessor = running.pocket.encoder, running.pocket.preprocessor
    body = CHAT | {"messages": ask("What?", circle("red"), square("blue"))}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert encoder.metrics()["cached_items"] > 0
    try:
        encoder.take_over(EncoderConfig(cache_bytes=0, max_batch_patches=1))
        preprocessor.take_over(PreprocessorConfig(threads=1))
        assert encoder.metrics()["cached_bytes"] == encoder.metrics()["cached_items"] == 0
        before = encoder.metrics()
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        after = encoder.metrics()
        # Two images in two launches, and none of them is kept.
        assert after["items"] - before["items"] == after["batches"] - before["batches"] == 2
        assert after["cached_items"] == 0
    finally:
        encoder.take_over(EncoderConfig())
        preprocessor.take_over(PreprocessorConfig())
    await running.wait_until_idle()
