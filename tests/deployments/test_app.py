"""The Ray Serve application that a configuration describes; no replica starts here."""

import inspect
import json
from pathlib import Path

import pytest
import yaml

from deployments.app import build, build_stages
from deployments.config import AppConfig
from engine.errors import CheckpointError, ConfigError
from tests.engine import tiny
from tests.serving import ROOT, app_args, changed_config


def test_the_shipped_configuration_builds():
    config = AppConfig.model_validate(app_args())
    assert Path(config.models[0].engine.model) == ROOT / "models" / "pocket"
    build(config)


def test_a_model_that_is_not_there():
    with pytest.raises(CheckpointError, match="no folder"):
        build(changed_config(model="./nowhere"))


def test_an_unknown_architecture_is_refused_with_those_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Mystery"]}))
    with pytest.raises(CheckpointError, match=r"Mystery.*Qwen2VLForConditionalGeneration"):
        build(changed_config(model=str(tmp_path)))


def test_an_option_of_the_processor_that_does_not_exist():
    with pytest.raises(ConfigError, match="num_crops"):
        build(changed_config(mm_processor_kwargs={"num_crops": 4}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_model_len", 1_000_000), ("tensor_parallel_size", 3), ("chat_template", "/nowhere")],
)
def test_what_does_not_fit_the_model_is_named(field, value):
    """Before any replica starts."""
    with pytest.raises(ConfigError) as caught:
        build(changed_config(**{field: value}))
    assert caught.value.param == field


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


@pytest.mark.parametrize("change", [{"num_replicas": 2}, {"autoscaling": {"max_replicas": 3}}])
def test_several_ingresses_share_what_they_keep(change):
    args = app_args()
    args["ingress"] = {**args.get("ingress", {}), **change}
    app = build(AppConfig.model_validate(args))
    from ray.serve._private.build_app import build_app

    built = build_app(app, name="test", default_runtime_env={})
    options = {deployment.name: deployment for deployment in built.deployments}
    for store in ("Responses", "References"):
        assert options[store].num_replicas == 1 and options[store].max_ongoing_requests > 1000


def test_every_deployment_reserves_a_cpu():
    """Ray may place others on the head of a cluster, whose pod offers no CPU so that it holds no replica."""
    from ray.serve._private.build_app import build_app

    args = app_args()
    args["ingress"] = {**args.get("ingress", {}), "num_replicas": 2}
    config = AppConfig.model_validate(args)
    built = [
        build_app(app, name="test", default_runtime_env={}) for app in (build(config), build_stages(config))
    ]
    deployments = [deployment for application in built for deployment in application.deployments]
    assert {"Responses", "References"} <= {deployment.name for deployment in deployments}
    assert all(deployment.ray_actor_options["num_cpus"] > 0 for deployment in deployments)


def test_what_ingresses_share_is_on_their_nodes():
    """On a node of another stage it would keep an autoscaler from giving that node back."""
    from ray.serve._private.build_app import build_app

    args = app_args()
    args["ingress"] = {"num_replicas": 2, "label_selector": {"sightline/stage": "cpu"}}
    config = AppConfig.model_validate(args)
    for application, names in (
        (build(config), {"Ingress", "Responses", "References"}),
        (build_stages(config), {"Stages:pocket"}),
    ):
        built = build_app(application, name="test", default_runtime_env={})
        selected = {
            deployment.name
            for deployment in built.deployments
            if deployment.ray_actor_options.get("label_selector") == {"sightline/stage": "cpu"}
        }
        assert selected == names


def test_whatever_works_answers_checks_of_its_health_on_its_own_event_loop():
    """Ray Serve calls coroutines there, and says by itself, elsewhere, that a class without one is well."""
    from ray.serve._private.build_app import build_app

    args = app_args()
    args["ingress"] = {"num_replicas": 2}
    built = build_app(build(AppConfig.model_validate(args)), name="test", default_runtime_env={})
    assert len(built.deployments) == 6
    for deployment in built.deployments:
        assert inspect.iscoroutinefunction(getattr(deployment.func_or_class, "check_health", None))


def test_the_file_is_what_serve_reads():
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve_config.yaml").read_text()))


def test_an_encoder_may_be_in_the_replicas_of_the_language_model():
    from ray.serve._private.build_app import build_app

    args = app_args()
    model = args["models"][0] = {**args["models"][0], "encoder": {"with_language_model": True}}
    built = build_app(build(AppConfig.model_validate(args)), name="test", default_runtime_env={})
    stages = {"LanguageModel:pocket", "Preprocessor:pocket"}
    assert {deployment.name for deployment in built.deployments} == stages | {"Ingress"}
    args["models"] = [{**model, "application": "stages"}]
    build(AppConfig.model_validate(args))
    engine = {**model["engine"], "tensor_parallel_size": 2}
    args["models"] = [{**model, "language_model": {"hosts": 2}, "engine": engine}]
    with pytest.raises(ValueError, match="one host"):
        AppConfig.model_validate(args)


def test_a_model_may_be_an_application_of_its_own():
    from ray.serve._private.build_app import build_app

    args = app_args()
    model = args["models"][0]
    stages = build_stages(AppConfig.model_validate({"models": [model]}))
    built = build_app(stages, name="stages", default_runtime_env={})
    names = {"LanguageModel:pocket", "Preprocessor:pocket", "VisionEncoder:pocket"}
    assert {deployment.name for deployment in built.deployments} == names | {"Stages:pocket"}
    # Behind HAProxy, Serve takes no router of an application's root.
    assert built.ingress_deployment_name == "Stages:pocket"
    routers = {
        deployment.name: deployment._deployment_config.request_router_config.request_router_class
        for deployment in built.deployments
    }
    assert routers["Stages:pocket"].endswith("PowerOfTwoChoicesRequestRouter")
    assert routers["LanguageModel:pocket"].endswith("LanguageModelRouter")
    args["models"] = [{**model, "application": "stages"}]
    ingress = build_app(build(AppConfig.model_validate(args)), name="http", default_runtime_env={})
    (alone,) = ingress.deployments
    assert alone.name == "Ingress"
    # The ingress asks for the deployments by the names that they have there.
    assert {(name, "stages") for name in names} == {*alone.init_args[1].values()}
    with pytest.raises(ConfigError, match="exactly one model"):
        build_stages(AppConfig.model_validate({"models": [model, {**model, "name": "two"}]}))


def test_text_models_of_another_application_have_no_media_stages(tmp_path):
    path = str(tiny.make_text(tmp_path, "qwen2"))
    args = {"models": [{"name": "text", "engine": {"model": path}, "application": "stages"}]}
    app = build(AppConfig.model_validate(args))
    assert app._bound_deployment.init_args[1] == {"language_model": ("LanguageModel:text", "stages")}
