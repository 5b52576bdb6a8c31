"""Configurations that are refused, each with the name of the field."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import build
from deployments.config import AppConfig
from engine.errors import CheckpointError, ConfigError
from tests.serving import ROOT, app_args


def changed(**engine) -> AppConfig:
    args = app_args()
    args["models"][0]["engine"] |= engine
    return AppConfig.model_validate(args)


def test_the_shipped_configuration_builds():
    config = AppConfig.model_validate(app_args())
    assert Path(config.models[0].engine.model) == ROOT / "models" / "pocket"
    build(config)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("models",), [], "models"),
        (("models", 0, "engine", "max_num_seq"), 4, "models.0.engine.max_num_seq"),
        (("models", 0, "engine", "block_size"), 12, "models.0.engine"),
        (("models", 0, "encoder", "num_replicas"), 0, "models.0.encoder.num_replicas"),
        (("models", 0, "language_model", "num_gpu"), 1, "models.0.language_model.num_gpu"),
        (("ingress", "max_body_bytes"), 0, "ingress.max_body_bytes"),
        (("fetch", "timeout"), -1, "fetch.timeout"),
    ],
)
def test_a_bad_value_is_named(path, value, field):
    args = app_args()
    place = args
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(args)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == field


def test_names_that_would_collide():
    args = app_args()
    args["models"] = [{**args["models"][0], "name": name} for name in ("a/b", "a b")]
    with pytest.raises(ValidationError, match="too alike"):
        AppConfig.model_validate(args)


def test_a_model_that_is_not_there():
    with pytest.raises(CheckpointError, match="no folder"):
        build(changed(model="./nowhere"))


def test_an_unknown_architecture_is_refused_with_those_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Mystery"]}))
    with pytest.raises(CheckpointError, match=r"Mystery.*Qwen2VLForConditionalGeneration"):
        build(changed(model=str(tmp_path)))


def test_an_option_of_the_processor_that_does_not_exist():
    with pytest.raises(ConfigError, match="num_crops"):
        build(changed(mm_processor_kwargs={"num_crops": 4}))


def test_every_stage_of_every_model_is_a_deployment_of_its_own():
    args = app_args()
    args["models"] = [{**args["models"][0], "name": name} for name in ("one", "org/two")]
    app = build(AppConfig.model_validate(args))
    from ray.serve._private.build_app import build_app

    built = build_app(app, name="test", default_runtime_env={})
    assert {deployment.name for deployment in built.deployments} == {
        "Ingress",
        *(
            f"{stage}:{name}"
            for stage in ("LanguageModel", "Preprocessor", "VisionEncoder")
            for name in ("one", "org--two")
        ),
    }
    options = {deployment.name: deployment for deployment in built.deployments}
    assert options["LanguageModel:one"].max_ongoing_requests >= 256


def test_the_file_is_what_serve_reads():
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve_config.yaml").read_text()))
