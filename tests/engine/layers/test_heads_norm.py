"""Norms whose weights differ between heads, split over ranks."""

from __future__ import annotations

import pytest

from engine import LLM, SamplingParams
from tests.engine.executor.threads import ThreadLauncher
from tests.engine.tiny import make_text


def test_ranks_have_the_norms_of_their_heads(tmp_path):
    """Also where two ranks share each KV head."""
    path, found = make_text(tmp_path, "cohere", use_qk_norm=True), []
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    for size in (1, 4):
        options = {"max_model_len": 64, "num_kv_blocks": 20, "tensor_parallel_size": size}
        llm = LLM(str(path), launcher=ThreadLauncher(), device="cpu", **options)
        (output,) = llm.generate("a red square 0 1 2 3", params, use_tqdm=False)
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append((output.outputs[0].token_ids, [row[token].logprob for token, row in scored]))
    (one, scores), (several, others) = found
    assert one == several and others == pytest.approx(scores, abs=1e-3)
