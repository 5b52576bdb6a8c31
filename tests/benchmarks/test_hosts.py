"""The benchmarks of the host's work: their engine and their stand-ins do what real ones do."""

import json
import sys

import numpy as np
import pytest
import torch
from ray.serve._private.build_app import build_app

from benchmarks import step_parts, without_model
from benchmarks.host import MODEL
from deployments.config import AppConfig
from deployments.ray_serve.channel import Outboxes
from deployments.ray_serve.packing import PixelsInfo
from deployments.ray_serve.served_model import ServedModel, give
from deployments.stages import Generation
from engine.prompt import EngineInput, MediaItem
from engine.sampling_params import SamplingParams


def test_step_parts_time_every_kind_of_step(monkeypatch, tmp_path, capsys):
    file = tmp_path / "parts.json"
    arguments = ["--answers", "3", "--tokens", "20", "--steps", "60", "--cold-mib", "0", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["step_parts", *arguments])
    monkeypatch.setattr(step_parts, "_WARM", 40)
    threads = torch.get_num_threads()
    step_parts.main()
    torch.set_num_threads(threads)
    found = json.loads(file.read_text())
    assert set(found) >= {"answers", "text", "image"} and sum(row["steps"] for row in found.values()) <= 60
    # The captured work of this device computes nothing; a part that is not timed would be zero.
    assert all(row[part][0] > 0 for row in found.values() for part in ("prepare", "launch", "take", "text"))
    assert found["image"]["admit"][0] > 0 == found["answers"]["admit"][3]
    for row in found.values():
        assert row["step"][3] >= max(row[part][3] for part in ("schedule", "prepare", "launch", "take"))


async def test_stand_ins_answer_as_a_model_does():
    """An image of two rows, and as many tokens as are asked for."""
    model = ServedModel(without_model._Steps(None, 1e-4), Outboxes(), without_model._Encoder())
    item = MediaItem.of_rows("image", "0" * 32, 6, 2, grid=(1, 2, 4), size=(8, 4))
    (rows,), (encoded,) = await model.embedded([PixelsInfo(item, "", 0.0)], [np.zeros((8, 12), np.uint8)])
    assert rows.rows.shape == (2, without_model._WIDTH) and encoded.hash == item.hash
    outboxes = Outboxes()
    with outboxes.open("reader", idle_s=None) as outbox:
        request = Generation("one", EngineInput([1]), SamplingParams(max_tokens=5))
        await give(model, outbox, request, [rows], [])
        updates = [update for message in outbox.take() for update in message]
    assert sum(len(delta[2]) for update in updates for delta in update[1]) == 5 and updates[-1][4]


@pytest.mark.parametrize("together", [False, True])
def test_the_application_without_a_model_has_stand_ins_for_it(together):
    model = {"name": "m", "engine": {"model": str(MODEL)}, "encoder": {"with_language_model": together}}
    app = without_model.build(AppConfig.model_validate({"models": [model]}))
    classes = {
        deployment.name.split(":")[0]: deployment.func_or_class
        for deployment in build_app(app, name="test", default_runtime_env={}).deployments
    }
    assert classes["LanguageModel"] is without_model.ModelReplica
    assert together or classes["VisionEncoder"] is without_model.EncoderReplica
