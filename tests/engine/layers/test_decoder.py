"""The decoder's switches against Transformers' own text models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from engine.families.registry import resolve
from engine.layers.decoder import Decoder
from engine.weights.checkpoint import Checkpoint
from engine.weights.loader import load_language_model
from tests.engine.decoding import prefill_logits
from tests.engine.tiny import TEXT_ARCHITECTURES, make_text

CPU = torch.device("cpu")


def load(path: Path, *, dtype: torch.dtype = torch.float32, **options) -> Decoder:
    checkpoint = Checkpoint.open(str(path))
    config = resolve(checkpoint).parse(checkpoint)
    return load_language_model(checkpoint, config, device=CPU, dtype=dtype, **options)


def reference(path: Path, *prompts: torch.Tensor) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(ids[None]).logits[0] for ids in prompts]


def run(decoder: Decoder, prompts: list[torch.Tensor], split: list[int] | None = None) -> list[torch.Tensor]:
    with torch.inference_mode():
        embeds = [decoder.embed(ids) for ids in prompts]
    return prefill_logits(decoder, embeds, [torch.arange(len(ids)) for ids in prompts], split=split)


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", TEXT_ARCHITECTURES)
def test_logits_equal_transformers(tmp_path, kind):
    path = make_text(tmp_path, kind)
    texts = prompts(47, 13)
    expected = reference(path, *texts)
    # One pass over both, and a cut in the middle of a block, the second in the first's company.
    for split in (None, [18, 5]):
        for ours, theirs in zip(run(load(path, max_model_len=64), texts, split), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"head_dim": 32},
    ],
    ids=str,
)
def test_switches_of_qwen(tmp_path, overrides):
    kind = "qwen3" if "head_dim" in overrides else "qwen2"
    path = make_text(tmp_path, kind, **overrides)
    texts = prompts(21)
    torch.testing.assert_close(
        run(load(path), texts)[0], reference(path, *texts)[0], atol=1e-4, rtol=0, check_dtype=True
    )


def test_longrope_takes_one_side_for_life(tmp_path):
    path = make_text(tmp_path, "phi3_longrope")
    short, long = prompts(30, 100)
    # Transformers looks at the length of the batch; we at how long sequences may become.
    torch.testing.assert_close(
        run(load(path, max_model_len=64), [short])[0], reference(path, short)[0], atol=1e-4, rtol=0
    )
    decoder = load(path, max_model_len=512)
    torch.testing.assert_close(run(decoder, [long])[0], reference(path, long)[0], atol=1e-4, rtol=0)
    assert (run(decoder, [short])[0] - reference(path, short)[0]).abs().max() > 0.01


def test_deepstack_adds_after_the_leading_layers(tmp_path):
    decoder = load(make_text(tmp_path, "llama"))
    (ids,) = prompts(9)
    extra = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeds, positions = decoder.embed(ids), torch.arange(9)
    plain = prefill_logits(decoder, [embeds], [positions])[0]
    added = prefill_logits(decoder, [embeds], [positions], deepstack=[extra])[0]
    # What the last layer's share does can be told from outside: it goes straight into the final norm.
    hidden_only = prefill_logits(decoder, [embeds], [positions], deepstack=[extra * 0])[0]
    torch.testing.assert_close(hidden_only, plain)
    assert (added - plain).abs().max() > 0.1


def test_bfloat16_stays_near_float32(tmp_path):
    path = make_text(tmp_path, "qwen2")
    texts = prompts(33)
    ours = run(load(path, dtype=torch.bfloat16), texts)[0]
    assert ours.dtype == torch.bfloat16
    exact = reference(path, *texts)[0]
    assert (ours.float() - exact).norm() / exact.norm() < 0.03
