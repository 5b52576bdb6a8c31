"""Cases that are drawn from a seed: the engine gives what Transformers gives, in each way of serving.

Each case is asked alone, and in one of the other modes: neighbouring cases take different ones. All modes of
all cases: ``make test-wide``. More cases: ``make exactness N=200 SEED=1 FAMILY=qwen2``.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from engine.families.registry import supported_architectures
from tests.engine.families.compare import Tally
from tests.engine.families.drawn import report
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.constraints import CONSTRAINTS
from tests.engine.families.drawn.families import FAMILIES
from tests.engine.families.drawn.modes import MODES
from tests.engine.families.drawn.run import Case, Result, lost, run

#: Numbers of cases that the engine serves. Together they have each rotary scaling and its fields, windows and
#: layer lists, both spellings, each kind of tower, filters, pads and a long video.
_SEEDS: dict[str, tuple[int, ...]] = {
    "llava": (2, 5),
    "llava_onevision": (3, 1018),
    "lfm2_vl": (7,),
    "lfm3": (0,),
    "lfm3_vl": (0,),
    "video_llama_3": (0,),
    "granite4_vision": (3,),
    "llava_next": (14,),
    "mistral3": (9,),
    "lighton_ocr": (8,),
    "gemma3": (1,),
    "cohere": (1,),
    "cohere2": (1,),
    "cohere2_moe": (1,),
    "ernie4_5": (1,),
    "ernie4_5_moe": (1,),
    "exaone4": (1,),
    "exaone4_5": (1,),
    "seed_oss": (1,),
    "olmo2": (1,),
    "olmo3": (1,),
    "smollm3": (1,),
    "hunyuan_v1_dense": (1,),
    "hyperclovax": (1,),
    "hyperclovax_vision_v2": (1,),
    "gemma4": (1,),
    "gemma4_unified": (1,),
    "aya_vision": (1,),
    "cohere2_vision": (1,),
    "internvl": (12,),
    "internvl_chat": (11,),
    "ovis2": (1,),
    "phi3_v": (0,),
    "vlm2vec": (100,),
    "qwen2_vl": (0,),
    "qwen2_5_vl": (1,),
    "qwen3_vl": (0,),
    "qwen3_5": (0, 2),
    "qwen3_5_moe": (2,),
    "qwen3_vl_moe": (40100,),
    "glm4v": (40100,),
    "glm46v": (40100,),
    "glm_ocr": (40100,),
    "paddleocr_vl": (40100,),
    "hunyuan_vl": (1,),
    "got_ocr2": (1,),
    "deepseek_ocr2": (1,),
    "deepseek_vl": (1,),
    "ernie4_5_vl": (1,),
    "molmo2": (1,),
    "muse_glimmer": (1,),
    "colqwen2": (40100,),
    "colpali": (60023,),
    "paligemma": (91018,),
    "paligemma2": (90101,),
    "minicpm_v": (2,),
    "minicpm_ocr": (1,),
    "minicpm_v4_6": (1,),
    "minicpm_v4_7": (80020,),
    "granite_docling": (1,),
    "idefics3": (3,),
    "smolvlm": (1,),
    "gemma": (40100,),
    "gemma2": (1,),
    "gemma3_text": (40100,),
    "gemma4_text": (40100,),
    "granite": (40100,),
    "granitemoe": (40100,),
    "ministral3": (40100,),
    "qwen3_5_text": (40100,),
    "qwen3_5_moe_text": (40100,),
    "lfm2": (1,),
    "llama": (29,),
    "mistral": (1, 7),
    "mixtral": (40100,),
    "phi3": (11,),
    "qwen2": (12,),
    "qwen2_moe": (1,),
    "qwen3_moe": (3,),
    "qwen3": (3, 24),
    "qianfan_ocr": (40100,),
    "glm": (40100,),
    "glm4": (40100,),
    "glm4_moe": (40100,),
    "glm4v_moe": (40101,),
}
_PAIRS = [(name, seed) for name in _SEEDS for seed in _SEEDS[name]]
#: Without ``--wide`` a case has one mode beside "alone": its number, modulo the number of modes. One of so
#: many has constraints, which take further answers of the reference.
_CONSTRAINED = 5
_CASES = [
    pytest.param(name, seed, number % len(MODES), number % _CONSTRAINED == 0, id=f"{name}-{seed}")
    for number, (name, seed) in enumerate(_PAIRS)
]


@pytest.mark.parametrize(("family", "seed", "other", "constrained"), _CASES)
def test_a_drawn_case_is_as_transformers_has_it(family, seed, other, constrained, wide):
    modes = [mode for number, mode in enumerate(MODES) if wide or number == other]
    without = () if wide or constrained else (CONSTRAINTS,)
    result = run(Case(FAMILIES[family], seed, tuple(modes), without))
    if any(reason.startswith("Unavailable") for reason in result.skipped):
        pytest.skip(result.skipped[0])
    assert result.differences == [], report.difference(result, result)
    assert result.status == "equal"


def test_every_architecture_is_drawn():
    assert {name for family in FAMILIES.values() for name in family.architectures} == set(
        supported_architectures()
    )


def test_every_family_has_a_fixed_case():
    assert _SEEDS.keys() == FAMILIES.keys()


def test_records_of_several_runs_add_up(tmp_path):
    equal = Result(Case(FAMILIES["llama"], 1), prompts=3, tallies={"alone": Tally(outputs=3, tokens=9)})
    runs = [[lost(equal.case)], [equal, Result(Case(FAMILIES["llama"], 2), refused=["why"])]]
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for file, run_of in zip(files, runs, strict=True):
        file.write_text("".join(json.dumps(report.record(result)) + "\n" for result in run_of))
    head, line, *reasons = report.table(report.read(files)).splitlines()
    found = dict(zip(head.split(), line.split(), strict=True))
    # The case that ran again counts once, as it ended the last time.
    assert found["cases"] == "2" and found["equal"] == "1" and found["prompts"] == "3"
    assert found["tokens"] == "9" and found["different"] == "1"
    assert any("why" in reason for reason in reasons) and "different llama 2: refused: why" in reasons


def test_every_mode_is_taken_by_several_cases():
    taken = Counter(case.values[2] for case in _CASES)
    assert len(taken) == len(MODES) and min(taken.values()) > 4


def test_choices_do_not_depend_on_each_other():
    plain, shorter = Draw("qwen2", 3), Draw("qwen2", 3, without=["shards"])
    assert plain.choice("size", range(100)) == shorter.choice("size", range(100))
    assert not shorter.varies("shards", 1.0) and plain.varies("shards", 1.0)
    assert plain.choice("size", range(100)) == Draw("qwen2", 3).choice("size", range(100))
