"""Towers and decoders with captured passes give the reference's answers.

On a GPU every test captures passes. Here a replay runs the work eagerly, over the same static, padded
tensors.
"""

import pytest
import torch

from engine import encoder, offline
from engine.executor import rank
from engine.runner import forward_graphs
from engine.vision import graphs as vision_graphs
from tests.engine.families.cases import CASES, LIKE
from tests.engine.rerun import rerun

_CASES = [
    pytest.param(case, id=case.name, marks=[pytest.mark.wide] if case.name in LIKE else []) for case in CASES
]


@pytest.fixture
def captured(monkeypatch):
    """Sizes so small that some batches fit and others don't."""
    if not torch.cuda.is_available():
        for module in (encoder, rank):
            monkeypatch.setattr(module, "make_capture", lambda device, enforce_eager: rerun)
    sizes = {"TOKEN_STEP": 24, "MAX_TOKENS": 192}
    for name, value in sizes.items():
        monkeypatch.setattr(vision_graphs, name, value)
        monkeypatch.setattr(forward_graphs, name, value)
    # No rows are remembered, or the tower would have nothing to do for prompts that it has seen.
    monkeypatch.setattr(offline, "_ROW_BYTES", 0)
    monkeypatch.setattr(forward_graphs, "FINE_TOKENS", 48)
    monkeypatch.setattr(forward_graphs, "FEW_SEQUENCES", 2)


@pytest.mark.parametrize("case", _CASES)
def test_answers_are_the_reference_s(captured, made, case, wide):
    model, prompts = made(case), case.prompts()
    llm = model.llm(max_num_seqs=4, enable_prefix_caching=False)
    tower = llm._encoder
    # One launch of the tower with several items, then each by itself.
    model.check(llm, prompts)
    shown = [prompt for prompt in prompts if prompt.pictures or prompt.frames]
    for prompt in prompts if wide else (shown or prompts)[:1]:
        launches = 0 if tower is None else tower.metrics()["batches"]
        model.check(llm, [prompt])
        assert tower is None or prompt not in shown or tower.metrics()["batches"] > launches
