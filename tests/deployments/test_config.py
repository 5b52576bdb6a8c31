"""Configurations that are refused, each with the name of the field."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import build
from deployments.config import AppConfig
from engine.errors import CheckpointError, ConfigError
from engine.frontend import fetch_policy
from engine.media.guard import FetchPolicy
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
        (("models", 0, "engine", "block_size"), 12, "models.0.engine.block_size"),
        (("models", 0, "engine", "dtype"), "int8", "models.0.engine.dtype"),
        (
            ("models", 0, "engine", "limit_mm_per_prompt"),
            {"image": -1},
            "models.0.engine.limit_mm_per_prompt.image",
        ),
        (("models", 0, "encoder", "num_replicas"), 0, "models.0.encoder.num_replicas"),
        (("models", 0, "language_model", "num_gpu"), 1, "models.0.language_model.num_gpu"),
        (("models", 0, "encoder", "num_gpus"), 1.5, "models.0.encoder.num_gpus"),
        (("models", 0, "encoder", "autoscaling"), {"min_replica": 1}, "models.0.encoder.autoscaling"),
        (
            ("models", 0, "encoder", "autoscaling"),
            {"min_replicas": 2, "max_replicas": 1},
            "models.0.encoder.autoscaling",
        ),
        (("images",), {"max_pixels": -1}, "images.max_pixels"),
        (("images",), {"formats": ["EPS"]}, "images.formats.0"),
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
    (fault,) = caught.value.errors()
    assert ".".join(map(str, fault["loc"])) == field


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_model_len", 1_000_000), ("tensor_parallel_size", 3), ("chat_template", "/nowhere")],
)
def test_what_does_not_fit_the_model_is_named(field, value):
    """Before any replica starts."""
    with pytest.raises(ConfigError) as caught:
        build(changed(**{field: value}))
    assert caught.value.param == field


def test_a_folder_of_pictures_is_the_models_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    config = changed(allowed_local_media_path="pictures").models[0].engine
    assert config.allowed_local_media_path == str(tmp_path / "pictures")
    general = FetchPolicy(timeout=3, allowed_local_media_path="/elsewhere")
    assert fetch_policy(config, general) == general.model_copy(
        update={"allowed_local_media_path": str(tmp_path / "pictures")}
    )
    assert fetch_policy(changed().models[0].engine, general) == general


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
