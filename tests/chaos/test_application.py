"""Configurations of the applications whose processes are killed."""

import pytest

from deployments.config import AppConfig
from tests.chaos.application import on_cpus, on_gpus
from tests.serving import app_args


@pytest.mark.parametrize(
    ("gpus", "ranks", "encoder", "language_model"), [(1, 1, 0.3, 0.6), (2, 1, 1, 1), (3, 2, 1, 2)]
)
def test_gpus_are_shared_or_given_to_ranks(gpus, ranks, encoder, language_model):
    args = app_args()
    on_gpus(args, gpus)
    (model,) = AppConfig.model_validate(args).models
    assert (model.engine.device, model.engine.dtype, model.engine.enforce_eager) == (
        "cuda",
        "bfloat16",
        False,
    )
    assert model.engine.tensor_parallel_size == ranks
    assert (model.encoder.num_gpus, model.language_model.num_gpus) == (encoder, language_model)


def test_without_gpus_the_language_model_has_two_ranks():
    args = app_args()
    on_cpus(args)
    (model,) = AppConfig.model_validate(args).models
    assert model.engine.tensor_parallel_size == 2 and model.language_model.num_gpus == 0
