"""Prompts and answers around and beyond the original context of a model: all kinds of rotary scaling.

Tokens and log-probabilities are those of Transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import LLM, SamplingParams
from tests.engine.tiny import make_text

TOKENS = 8
#: Of every checkpoint here, in tokens.
ORIGINAL = 64
#: Prompts whose answers stay within the original context, grow beyond it, and begin at and behind its end.
LENGTHS = (20, ORIGINAL - TOKENS - 1, ORIGINAL - 5, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 150)

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
#: Architecture and configuration by name. Positions are those of the file, before scaling where it stretches.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": (
        "mistral",
        {
            "sliding_window": None,
            "max_position_embeddings": ORIGINAL,
            # Mistral has none, whatever its file says.
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 1e4,
                "factor": 4.0,
                # Means nothing with this type.
                "attention_factor": 2.0,
            },
        },
    ),
    "yarn": ("qwen2", {"max_position_embeddings": ORIGINAL, "rope_parameters": _YARN}),
    "yarn, all fields": (
        "qwen3",
        {
            "attention_bias": True,
            "max_position_embeddings": 4 * ORIGINAL,
            "rope_parameters": {
                **_YARN,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 0.8,
                "mscale_all_dim": 0.4,
                "truncate": False,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama3 without its original context": (
        "llama",
        {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ),
    "longrope": ("phi3_longrope", {}),
    "longrope of a part of each head": (
        "phi3_longrope",
        {
            "rope_parameters": {
                **_LONGROPE,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.05 * i for i in range(6)],
                "long_factor": [2.0 + 0.5 * i for i in range(6)],
            }
        },
    ),
    "longrope and windows": ("phi3_longrope", {"sliding_window": 40}),
}


@dataclass
class Reference:
    """A checkpoint and what Transformers' model of it generates."""

    path: Path

    @cached_property
    def _answers(self) -> dict[tuple[int, ...], tuple[list[int], torch.Tensor]]:
        return {}

    def answer(self, ids: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """``TOKENS`` greedy tokens after a prompt, and their log-probabilities."""
        if tuple(ids) not in self._answers:
            self._answers[tuple(ids)] = self._generate(ids)
        return self._answers[tuple(ids)]

    @torch.inference_mode()
    def _generate(self, ids: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        # With dynamic scaling a model remembers the frequencies of longer prompts: each gets a new model.
        out = self._load().generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=1 << 30,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            # Some releases forget all keys when longrope's frequencies change, and compute one of them again.
            use_cache=not self._longrope,
        )
        tokens = out.sequences[0, -TOKENS:]
        logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens.tolist(), logprobs

    def _load(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    @cached_property
    def _longrope(self) -> bool:
        return self._load().config.rope_parameters["rope_type"] == "longrope"

    @torch.inference_mode()
    def prompt_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the log-probability of each token of a prompt but the first."""
        rows = self._load()(torch.tensor([ids])).logits[0].log_softmax(-1)
        return rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in found:
            kind, overrides = CASES[name]
            found[name] = Reference(make_text(tmp_path_factory.mktemp("text"), kind, seed=5, **overrides))
        return found[name]

    return get


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]


def load(reference: Reference, **options: Any) -> LLM:
    return LLM(str(reference.path), **{"device": "cpu", "kv_cache_bytes": 8 << 20, **options})


def run(llm: LLM, given: Sequence[Sequence[int]], **more: Any) -> list[Any]:
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, **more)
    return llm.generate([{"prompt_token_ids": ids} for ids in given], params, use_tqdm=False)


def check(llm: LLM, reference: Reference, given: Sequence[Sequence[int]]) -> None:
    for ids, output in zip(given, run(llm, given), strict=True):
        tokens, logprobs = reference.answer(ids)
        (completion,) = output.outputs
        assert completion.token_ids == tokens, len(ids)
        rows = zip(completion.logprobs, tokens, strict=True)
        ours = torch.tensor([row[token].logprob for row, token in rows])
        torch.testing.assert_close(ours, logprobs, atol=1e-3, rtol=0)
    llm.check_integrity()


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_all_lengths(made, name):
    reference = made(name)
    llm = load(reference)
    assert llm.max_model_len >= 4 * ORIGINAL
    check(llm, reference, prompts())
    (output,) = run(llm, prompts()[-1:], prompt_logprobs=0)
    rows = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    ours = torch.tensor([row[token].logprob for row, token in rows])
    torch.testing.assert_close(ours, reference.prompt_logprobs(prompts()[-1]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_chunks_alone_and_steps_ahead(made, name):
    reference = made(name)
    check(load(reference, max_num_batched_tokens=13, max_num_seqs=4, block_size=4), reference, prompts())
    llm = load(reference, run_ahead=0, enable_prefix_caching=False)
    for ids in prompts():
        check(llm, reference, [ids])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_preempted(made, name):
    """Blocks for two prompts, but not for their answers."""
    reference = made(name)
    within, near, beyond, long = (prompts()[index] for index in (1, 2, 5, 6))
    for pair in ([within, near], [near, beyond], [long, long]):
        blocks = sum(-(-len(ids) // 4) for ids in pair) + 2
        llm = load(reference, num_kv_blocks=blocks, block_size=4, enable_prefix_caching=False)
        check(llm, reference, pair * 2)
        assert llm.metrics()["preempted"] > 0


@pytest.mark.parametrize("name", CASES)
def test_turn_after_turn_from_the_cache(made, name):
    """A conversation that grows across the boundary: what was computed for a shorter one is used only where
    it is the same."""
    reference = made(name)
    llm = load(reference, block_size=4)
    ids = prompts()[0]
    for more in (prompts()[0], prompts()[0], prompts()[-1][:30]):
        for _ in range(2):
            check(llm, reference, [ids])
        ids = [*ids, *reference.answer(ids)[0], *more]
    assert llm.metrics()["cached_tokens"] > 0
