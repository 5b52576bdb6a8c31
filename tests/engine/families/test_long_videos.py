"""Answers to videos with more steps in time than merged rows and text behind them.

The greatest position of such a prompt is the video's last step, not its last token. An answer's positions go
on from the last token, and those of the next turn, which computes them anew, are the same.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.families.case import TOKENS, CasePrompt
from tests.engine.families.cases import case_named
from tests.engine.families.expected import Expected
from tests.engine.families.made import greedy
from tests.engine.families.qwen import FRAME, VIDEO
from tests.engine.tiny import picture

FRAMES = tuple(picture(16, 16, seed) for seed in range(104))


def ask(llm: Any, ids: list[int]) -> Any:
    data = {"video": [list(FRAMES)]}
    (output,) = llm.generate({"prompt_token_ids": ids, "multi_modal_data": data}, greedy(), use_tqdm=False)
    return output


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_answers_and_their_next_turn_are_those_of_transformers(made, name):
    model = made(case_named(name))
    first = model.inputs(CasePrompt(FRAME.format(f"{VIDEO}what is shown?"), frames=FRAMES))
    answer = Expected(first, TOKENS)
    second = first.extended([*answer.tokens, *range(40, 60)])
    options = {"max_model_len": 1024, "kv_cache_bytes": 32 << 20, "block_size": 4}
    cached = model.llm(**options)
    model.compare(ask(cached, first.ids), answer)
    computed = model.llm(**options, enable_prefix_caching=False)
    wanted = Expected(second, TOKENS)
    for llm in (cached, computed):
        model.compare(ask(llm, second.ids), wanted)
    assert cached.metrics()["cached_tokens"] > len(first.ids)
