"""The README's examples and statements are true."""

import re

import yaml

from deployments.config import AppConfig
from engine.families.registry import supported_architectures
from tests.serving import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_compiles():
    found = blocks("python")
    assert len(found) >= 2
    for block in found:
        compile(block, "README.md", "exec")


def test_the_configuration_is_valid_and_reaches_the_deployments():
    retrieval, config = [AppConfig.model_validate(yaml.safe_load(block)) for block in blocks("yaml")]
    assert [model.engine.task for model in retrieval.models] == ["embed", "score"]
    encoder = config.models[1].encoder.options()
    scale = encoder["autoscaling_config"]
    assert (scale["min_replicas"], scale["max_replicas"]) == (1, 4)
    assert "num_replicas" not in encoder
    assert encoder["ray_actor_options"]["num_gpus"] == 0.2


def test_all_supported_models_are_listed():
    rows = [row for row in README.splitlines() if row.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    supported = set(supported_architectures())
    assert supported <= listed
    assert {name for name in listed if name.startswith(("Llava", "Qwen", "Phi", "Idefics"))} <= supported


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_every_target_of_make_exists():
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"serve", "test", "lint", "bench"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
