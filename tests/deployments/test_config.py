"""Configurations that are refused, each with the name of the field."""

import pytest
from pydantic import ValidationError

from deployments.access import KeyConfig
from deployments.config import AppConfig
from engine.media.guard import FetchPolicy
from engine.model_parts import fetch_policy
from tests.deployments.configuration import PARTS, options
from tests.serving import app_args, changed_config


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
        (("models", 0, "engine", "num_kv_blocks"), 1, "models.0.engine.num_kv_blocks"),
        (("models", 0, "encoder", "num_replicas"), 0, "models.0.encoder.num_replicas"),
        (("ingress", "cors_origins"), ["localhost:3000"], "ingress.cors_origins"),
        (("ingress", "cors_origins"), ["http://localhost:3000/"], "ingress.cors_origins"),
        (("documents",), {"max_dpi": 100}, "documents"),
        (("images",), {"formats": []}, "images.formats"),
        (("models", 0, "language_model", "num_gpu"), 1, "models.0.language_model.num_gpu"),
        (("models", 0, "encoder", "num_gpus"), 1.5, "models.0.encoder.num_gpus"),
        # What Ray would refuse when the application is deployed.
        (("models", 0, "encoder", "num_cpus"), float("inf"), "models.0.encoder.num_cpus"),
        (("models", 0, "encoder", "resources"), {"GPU": 1}, "models.0.encoder.resources"),
        (("models", 0, "encoder", "num_replicas"), 1 << 31, "models.0.encoder.num_replicas"),
        (("ingress", "max_ongoing_requests"), 10**10, "ingress.max_ongoing_requests"),
        (("models", 0, "encoder", "autoscaling"), {"min_replica": 1}, "models.0.encoder.autoscaling"),
        (
            ("models", 0, "encoder", "autoscaling"),
            {"min_replicas": 2, "max_replicas": 1},
            "models.0.encoder.autoscaling",
        ),
        (("models", 0, "encoder", "max_surge_percent"), 101, "models.0.encoder.max_surge_percent"),
        (("models", 0, "encoder", "health_check_period_s"), 0, "models.0.encoder.health_check_period_s"),
        (("models", 0, "encoder", "label_selector"), {"stage": "in()"}, "models.0.encoder.label_selector"),
        (("models", 0, "encoder", "label_selector"), {"-stage": "a"}, "models.0.encoder.label_selector"),
        (("ingress", "label_selector"), {"stage": 1}, "ingress.label_selector.stage"),
        (("images",), {"max_pixels": -1}, "images.max_pixels"),
        (("images",), {"formats": ["EPS"]}, "images.formats.0"),
        (("ingress", "max_body_bytes"), 0, "ingress.max_body_bytes"),
        (("fetch", "timeout"), -1, "fetch.timeout"),
        # What no machine can hold.
        (("models", 0, "engine", "num_kv_blocks"), 10**12, "models.0.engine.num_kv_blocks"),
        (("models", 0, "engine", "max_num_seqs"), 10**12, "models.0.engine.max_num_seqs"),
        (("models", 0, "engine", "max_num_batched_tokens"), 10**12, "models.0.engine.max_num_batched_tokens"),
        (("models", 0, "engine", "seed"), 1 << 63, "models.0.engine.seed"),
        (("models", 0, "preprocessor", "threads"), 10**12, "models.0.preprocessor.threads"),
        (("models", 0, "preprocessor", "video_processes"), 10**12, "models.0.preprocessor.video_processes"),
        (
            ("models", 0, "preprocessor"),
            {"document_processes": 10**12},
            "models.0.preprocessor.document_processes",
        ),
        (("ingress", "threads"), 10**12, "ingress.threads"),
        (("models", 0, "engine", "model"), "", "models.0.engine.model"),
        (("models", 0, "engine", "tokenizer"), "", "models.0.engine.tokenizer"),
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


#: Values that hardly any option can have, and none may fail at.
ODD = (True, [True], {"image": True}, 10**40, -(10**40), float("nan"), float("inf"), "", "x\0", [], {})


@pytest.mark.parametrize(
    ("part", "option"),
    [(part, option.name) for part in dict.fromkeys(PARTS.values()) for option in options(part)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_option_takes_odd_values_or_is_named(part, option):
    """A number takes no ``yes`` of YAML for 1."""
    model = {"name": "n", "engine": {"model": "m"}}
    given = {"model": "m", **model, "models": [model], "endpoint": "http://e"}
    given = {name: value for name, value in given.items() if name in part.model_fields}
    if part is KeyConfig and option not in ("env", "file", "key"):
        given["env"] = "E"
    default = part.model_fields[option].get_default(call_default_factory=True)
    for value in ODD:
        faults = []
        try:
            part.model_validate({**given, option: value})
        except ValidationError as error:
            faults = error.errors()
        assert all(fault["loc"][:1] in ((option,), ()) for fault in faults), faults
        if value is True:
            assert bool(faults) == (not isinstance(default, bool))


def test_names_that_would_collide():
    args = app_args()
    args["models"] = [{**args["models"][0], "name": name} for name in ("a/b", "a b")]
    with pytest.raises(ValidationError, match="too alike"):
        AppConfig.model_validate(args)


def test_a_folder_of_pictures_is_the_models_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    config = changed_config(allowed_local_media_path="pictures").models[0].engine
    assert config.allowed_local_media_path == str(tmp_path / "pictures")
    general = FetchPolicy(timeout=3, allowed_local_media_path="/elsewhere")
    assert fetch_policy(config, general) == general.model_copy(
        update={"allowed_local_media_path": str(tmp_path / "pictures")}
    )
    assert fetch_policy(changed_config().models[0].engine, general) == general


def test_placement_and_upgrades_reach_the_deployments():
    args = app_args()
    args["models"][0]["language_model"] |= {"label_selector": {"sightline/stage": "in(a, b)"}, "num_gpus": 2}
    args["models"][0]["encoder"] |= {"max_surge_percent": 50, "num_gpus": 1, "health_check_period_s": 2}
    config = AppConfig.model_validate(args)
    language_model, encoder = config.models[0].language_model.options(), config.models[0].encoder.options()
    assert language_model["ray_actor_options"]["label_selector"] == {"sightline/stage": "in(a, b)"}
    assert encoder["health_check_period_s"] == 2
    # Without a word about it, replicas without GPUs surge; those with GPUs may have no spare one.
    surges = [stage["max_surge_percent"] for stage in (language_model, encoder, config.ingress.options())]
    assert surges == [0, 50, 100]
    assert "label_selector" not in config.ingress.options()["ray_actor_options"]


def language_model(engine: dict, **fields) -> AppConfig:
    args = app_args()
    args["models"][0]["language_model"] = fields
    args["models"][0]["engine"] |= engine
    return AppConfig.model_validate(args)


def test_ranks_follow_from_hosts_and_their_gpus():
    (spec,) = language_model({}, hosts=2, gpus_per_host=4, num_replicas=3).models
    assert spec.engine.tensor_parallel_size == 8
    options = spec.language_model.options()
    assert options["num_replicas"] == 6 and options["ray_actor_options"]["num_gpus"] == 4
    assert options["gang_scheduling_config"]["gang_size"] == 2
    (same,) = language_model({"tensor_parallel_size": 8}, hosts=2, gpus_per_host=4).models
    assert same.engine.tensor_parallel_size == 8
    # Without GPUs, as in tests of several processes.
    (plain,) = language_model({"tensor_parallel_size": 4}, hosts=2).models
    assert plain.language_model.options()["ray_actor_options"]["num_gpus"] == 0


def test_bounds_of_autoscaling_count_copies_of_the_model():
    scale = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 64}
    (spec,) = language_model({}, hosts=2, gpus_per_host=1, autoscaling=scale).models
    found = spec.language_model.options()["autoscaling_config"]
    assert (found["min_replicas"], found["max_replicas"]) == (2, 6)
    # All requests are at the first host of each copy, and only that one reports signals.
    assert found["policy"]["policy_kwargs"]["gang_size"] == 2
    assert found["policy"]["policy_kwargs"]["targets"]["requests"] == 64
    assert spec.language_model.autoscaling == scale


@pytest.mark.parametrize(
    ("engine", "fields", "message"),
    [
        (
            {"tensor_parallel_size": 4},
            {"hosts": 2, "gpus_per_host": 4},
            "is 4, but there are 2 x 4 GPUs",
        ),
        ({"tensor_parallel_size": 3}, {"hosts": 2}, "3 can't be shared evenly by 2 hosts"),
        ({}, {"gpus_per_host": 4, "num_gpus": 2}, "give only one"),
    ],
)
def test_ranks_that_do_not_fill_the_hosts_are_refused(engine, fields, message):
    with pytest.raises(ValidationError, match=message):
        language_model(engine, **fields)
