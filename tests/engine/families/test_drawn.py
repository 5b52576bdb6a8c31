"""Cases that are drawn from a seed: the engine gives what Transformers gives, in each way of serving.

More of them: ``make exactness N=200 SEED=1 FAMILY=qwen2``.
"""

from __future__ import annotations

import pytest

from tests.engine.families.drawn import report
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.families import FAMILIES
from tests.engine.families.drawn.run import Case, run

#: Cases that the engine serves, by family: the first ones from 0 on.
_SEEDS: dict[str, tuple[int, ...]] = {
    "llava": (2,),
    "llava_onevision": (2, 3),
    "qwen2_5_vl": (1,),
    "minicpm_v": (2,),
    "idefics3": (3,),
    "smolvlm": (0, 1),
    "llama": (2,),
    "mistral": (2, 3),
    "phi3": (3,),
    "qwen3": (2,),
}
_CASES = [pytest.param(name, seed, id=f"{name}-{seed}") for name in _SEEDS for seed in _SEEDS[name]]


@pytest.mark.parametrize(("family", "seed"), _CASES)
def test_a_drawn_case_is_as_transformers_has_it(family, seed):
    result = run(Case(FAMILIES[family], seed))
    if any(reason.startswith("Unavailable") for reason in result.skipped):
        pytest.skip(result.skipped[0])
    assert result.differences == [], report.difference(result, result)
    assert result.status == "equal"


def test_choices_do_not_depend_on_each_other():
    plain, shorter = Draw("qwen2", 3), Draw("qwen2", 3, without=["shards"])
    assert plain.choice("size", range(100)) == shorter.choice("size", range(100))
    assert not shorter.varies("shards", 1.0) and plain.varies("shards", 1.0)
    assert plain.choice("size", range(100)) == Draw("qwen2", 3).choice("size", range(100))
