"""Numbers of replicas from the stages' signals."""

import math
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from ray.serve._private.gang_scheduling_autoscaling_policy import GangSchedulingAutoscalingPolicy
from ray.serve.config import AutoscalingConfig

from deployments.autoscaling import SIGNALS, StagePolicy, autoscaling_config, targets_of, wanted
from deployments.stage_config import EncoderConfig, LanguageModelConfig, PreprocessorConfig


def context(running: float = 0, queued: float = 0, **signals) -> SimpleNamespace:
    """The context that Serve gives a policy; values of a signal by replica."""
    metrics = {name: dict(enumerate(values)) for name, values in signals.items()}
    return SimpleNamespace(
        aggregated_metrics=metrics or None, total_num_requests=running + queued, total_queued_requests=queued
    )


def replicas(policy: StagePolicy, ctx: SimpleNamespace) -> int:
    return math.ceil(policy(ctx)[0])


def test_the_signal_that_asks_for_most_decides():
    policy = StagePolicy({"kv_usage": 0.7, "waiting_tokens": 4000})
    assert replicas(policy, context(9, kv_usage=[0.9, 0.9], waiting_tokens=[0, 0])) == 3
    assert replicas(policy, context(9, kv_usage=[0.9, 0.9], waiting_tokens=[9000, 9000])) == 5
    assert replicas(policy, context(9, kv_usage=[0.2, 0.3], waiting_tokens=[0, 0])) == 1


def test_work_of_another_stage_counts_for_nothing():
    """Images grow preprocessors and encoders, texts the language model."""
    images = {"megapixels": [500.0], "visual_tokens": [90000.0]}
    for stage in ("preprocessor", "encoder"):
        assert replicas(StagePolicy(targets_of(stage, {})), context(3, **images)) > 10
    assert replicas(StagePolicy(targets_of("language_model", {})), context(3, **images)) == 1


def test_an_idle_stage_wants_no_replica_and_one_request_wants_one():
    for stage in SIGNALS:
        policy = StagePolicy(targets_of(stage, {}))
        assert replicas(policy, context()) == 0
        assert replicas(policy, context(running=1)) == replicas(policy, context(queued=1)) == 1


def test_what_no_replica_has_taken_yet_counts_within_bounds():
    policy = StagePolicy({"megapixels": 10})
    assert replicas(policy, context(4, 0, megapixels=[20])) == 2
    assert replicas(policy, context(4, 4, megapixels=[20])) == 4
    assert replicas(policy, context(4, 400, megapixels=[20])) == 6
    assert wanted({"requests": 5}, {}, running=3, queued=12) == 3


def test_gangs_are_whole():
    """The first replica of each gang reports for all of it."""
    policy = StagePolicy({"kv_usage": 0.7}, gang_size=2)
    assert replicas(policy, context(9, kv_usage=[0.9])) == 3
    ctx = context(9, kv_usage=[0.9])
    ctx.config, ctx.target_num_replicas = AutoscalingConfig(), 2
    serve = GangSchedulingAutoscalingPolicy(lambda ctx: (replicas(policy, ctx), {}), 2)
    assert serve(ctx)[0] == 4


def test_serve_takes_the_policy_with_its_targets():
    options = PreprocessorConfig(autoscaling={"max_replicas": 4, "targets": {"megapixels": 5}}).options()
    config = AutoscalingConfig.model_validate(options["autoscaling_config"])
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert replicas(policy, context(1, megapixels=[14])) == 3 and config.max_replicas == 4
    given = {"max_replicas": 4, "target_ongoing_requests": 7}
    assert autoscaling_config("encoder", given)["policy"]["policy_kwargs"]["targets"] == {
        "visual_tokens": 2048,
        "requests": 7,
    }
    own = {
        "max_replicas": 2,
        "policy": {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"},
    }
    assert autoscaling_config("encoder", own) == own


@pytest.mark.parametrize(
    ("cls", "autoscaling", "named"),
    [
        (EncoderConfig, {"targets": {"megapixels": 3}}, "megapixels"),
        (LanguageModelConfig, {"targets": {"kv_usage": -1}}, "kv_usage"),
        (
            LanguageModelConfig,
            {"targets": {"kv_usage": "much"}},
            "kv_usage must be a number from 0 on, not 'much'",
        ),
        (LanguageModelConfig, {"targets": {"kv_usage": float("nan")}}, "kv_usage"),
        (LanguageModelConfig, {"targets": ["kv_usage"]}, "targets must name signals"),
        (EncoderConfig, {"policy": {"policy_function": "nowhere:policy"}}, "No module named 'nowhere'"),
        (EncoderConfig, {"targets": {"visual_tokens": 1}, "policy": {}}, "policy"),
        (EncoderConfig, {"max": 3}, "'max'"),
        (EncoderConfig, {"min_replicas": 3, "max_replicas": 2}, "max_replicas"),
    ],
)
def test_faults_of_the_configuration_are_named(cls, autoscaling, named):
    with pytest.raises(ValidationError, match=named):
        cls(autoscaling=autoscaling)


def test_a_signal_is_turned_off_by_zero():
    assert targets_of("language_model", {"kv_usage": 0}) == {"waiting_tokens": 4096}
