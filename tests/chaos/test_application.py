"""Configurations of the applications whose processes are killed, and how long the killing goes on."""

import asyncio
import itertools

import pytest

from deployments.config import AppConfig
from tests.chaos.application import on_cpus, on_gpus
from tests.chaos.load import Vector
from tests.chaos.victims import RANK, STAGES, Killer
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


def test_several_language_models_share_the_gpus_and_encode_themselves():
    args = app_args()
    on_gpus(args, 4, language_models=2)
    (model,) = AppConfig.model_validate(args).models
    assert model.engine.tensor_parallel_size == 2 and model.encoder.with_language_model
    assert (model.language_model.num_replicas, model.language_model.num_gpus) == (2, 2)


def test_without_gpus_the_language_model_has_two_ranks():
    args = app_args()
    on_cpus(args)
    (model,) = AppConfig.model_validate(args).models
    assert model.engine.tensor_parallel_size == 2 and model.language_model.num_gpus == 0


def test_vectors_may_be_rounded_otherwise_but_not_differ():
    found = [Vector([0.25, -0.5])]
    assert found == [Vector([0.25, -0.50001])]
    assert found != [Vector([0.25, -0.501])] and found != [Vector([0.25])] and found != [[0.25, -0.5]]


class Patient(Killer):
    """Counts its victims without killing them; spares the kinds in ``spared``."""

    spared: tuple[str, ...] = ()

    async def _victims(self, kinds):
        asked = [kind for kind in kinds if kind not in self.spared]
        self.killed.update(asked)
        return {}


@pytest.mark.parametrize(("spared", "most_s", "rounds"), [((), 600.0, 2), ((RANK,), 0.0, 0)])
def test_killing_ends_once_each_kind_was_killed_or_the_time_is_up(spared, most_s, rounds):
    killer = Patient(None, [("Preprocessor", RANK), "VisionEncoder", "LanguageModel"], 0.0)
    killer.spared = spared
    asyncio.run(killer.run(0.0, itertools.count().__next__, least=2, most_s=most_s))
    assert killer.killed == {kind: rounds for kind in (*STAGES, RANK) if rounds}
