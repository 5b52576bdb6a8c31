"""The decoder's switches against Transformers' own text models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.distributed.group import SingleProcessGroup
from engine.errors import CheckpointError
from engine.families.load import load_language_model
from engine.families.parsing.decoder import parse_decoder
from engine.families.registry import resolve
from engine.kernels.split_sums import SplitSums
from engine.layers import linear
from engine.layers.build import BuildContext
from engine.layers.decoder import Decoder
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.parallel_layer import ParallelLayer
from engine.layers.post_norm_layer import PostNormLayer
from engine.weights.loader import fill_from_checkpoint
from tests.engine.decoding import metadata, poisoned_caches, prefill_logits
from tests.engine.tiny import TEXT_ARCHITECTURES, make_text, rewrite_json, spread

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
    positions = [torch.arange(len(ids)) for ids in prompts]
    return prefill_logits(decoder, embeds, positions, split=split, ids=prompts)


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


def test_norms_of_gemma4_are_rounded_once(tmp_path):
    decoder = load(make_text(tmp_path, "gemma4"), max_model_len=64)
    assert {norm.offset for norm in decoder.modules() if isinstance(norm, RMSNorm)} == {0.0}


@pytest.mark.parametrize("kind", TEXT_ARCHITECTURES)
def test_norms_add_up_what_programs_computed_apart(tmp_path, monkeypatch, kind):
    taken = []

    def halves(x, weight, bias=None, *, counters=None, scale=None):
        middle = x.shape[1] // 2
        parts = [x[:, :middle] @ weight[:, :middle].T, x[:, middle:] @ weight[:, middle:].T]
        if bias is not None:
            parts[0] += bias
        taken.append(len(x))
        return SplitSums(torch.stack(parts), x.dtype)

    path, texts = make_text(tmp_path, kind), prompts(47, 13)
    expected = run(load(path, max_model_len=64), texts)
    monkeypatch.setattr(linear, "split_linear", halves)
    decoder = load(path, max_model_len=64)
    for found, plain in zip(run(decoder, texts), expected, strict=True):
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
    taking = [layer for layer in decoder.layers if not isinstance(layer, PostNormLayer)]
    dense = [layer for layer in taking if isinstance(layer.mlp, GatedMLP)]
    # A parallel layer's attention is behind no experts: its sums reach the next norm.
    before_norms = [layer for layer in taking if layer in dense or isinstance(layer, ParallelLayer)]
    attentions = [layer for layer in before_norms if layer.self_attn is not None]
    assert len(taken) == len(attentions) + len(dense)


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


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_of_a_mistral_checkpoint_are_added_where_it_states_and_stores_them(tmp_path, biases):
    """Transformers' Mistral class has none, so the reference is Llama's, of which Mistral is the same."""
    path = make_text(tmp_path / "llama", "llama", **biases)
    (expected,) = reference(path, *(texts := prompts(21)))
    as_mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    rewrite_json(path / "config.json", as_mistral)
    torch.testing.assert_close(run(load(path), texts)[0], expected, atol=1e-4, rtol=0)

    rewrite_json(path / "config.json", dict.fromkeys(biases, False))
    with pytest.raises(CheckpointError, match=r"doesn't have: .*bias"):
        load(path)


def test_biases_that_a_mistral_checkpoint_states_without_storing_them_are_none(tmp_path):
    path = make_text(tmp_path, "mistral", attention_bias=True)
    texts = prompts(21)
    torch.testing.assert_close(run(load(path), texts)[0], reference(path, *texts)[0], atol=1e-4, rtol=0)


def test_longrope_has_a_table_for_short_and_for_long_sequences(tmp_path):
    path = make_text(tmp_path, "phi3_longrope")
    # 64 tokens are the original context.
    texts = prompts(30, 64, 65, 100)
    decoder = load(path, max_model_len=512)
    with torch.inference_mode():
        embeds = [decoder.embed(ids) for ids in texts]
    positions = [torch.arange(len(ids)) + decoder.rotary.offset(int(len(ids) > 64)) for ids in texts]
    # All in one batch: each sequence has its own frequencies.
    found = prefill_logits(decoder, embeds, positions, split=[18, 50, 3, 70])
    for ours, theirs in zip(found, reference(path, *texts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_deepstack_and_interleaved_positions_as_in_qwen3_vl(tmp_path):
    raw = transformers.Qwen3VLTextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    )
    reference = spread(transformers.Qwen3VLTextModel(raw))
    config = replace(parse_decoder(raw.to_dict(), "qwen3_vl"), deepstack_layers=(0, 1, 2))
    decoder = Decoder(config, BuildContext(CPU, torch.float32, SingleProcessGroup()))
    tensors = {name: value.contiguous() for name, value in reference.state_dict().items()}
    save_file({**tensors, "lm_head.weight": torch.eye(320, 64)}, tmp_path / "model.safetensors")
    rules = WeightRules(language=((r"(.*)", r"\1"),))
    fill_from_checkpoint(decoder, "language", Checkpoint(tmp_path), rules)

    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(23, 64, generator=generator)
    positions = torch.randint(0, 40, (3, 23), generator=generator)
    visual = torch.zeros(23, dtype=torch.bool)
    visual[4:15] = True
    # One for every layer, the last one too.
    features = torch.randn(3, 11, 64, generator=generator)
    with torch.inference_mode():
        expected = reference(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            visual_pos_masks=visual[None],
            deepstack_visual_embeds=list(features),
        ).last_hidden_state[0]
    deepstack = torch.zeros(3, 23, 64)
    deepstack[:, visual] = features
    hidden = prefill_logits(decoder, [embeds], [positions], deepstack=[deepstack], split=[9])[0][:, :64]
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)
    # Some tokens alone, images' and text's.
    rows = torch.tensor([22, 7, 7, 0])
    meta = metadata([0], [23], [[3, 1, 6, 2, 5, 4]])
    with torch.inference_mode():
        some = decoder(embeds, positions, poisoned_caches(decoder, 7, 1), meta, deepstack, rows)
    torch.testing.assert_close(some, expected[rows], atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32(tmp_path):
    path = make_text(tmp_path, "qwen2")
    texts = prompts(33)
    ours = run(load(path, dtype=torch.bfloat16), texts)[0]
    assert ours.dtype == torch.bfloat16
    exact = reference(path, *texts)[0]
    assert (ours.float() - exact).norm() / exact.norm() < 0.03
