"""With a KV cache in fp8 the engine gives what Transformers gives with a cache that rounds likewise."""

from __future__ import annotations

import pytest
import torch
import transformers

from engine import LLM, SamplingParams
from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.distributed.group import SingleProcessGroup
from engine.errors import ConfigError
from engine.executor import rank
from engine.families.registry import resolve
from engine.kernels.fp8 import FP8
from engine.layers.decoder_config import DecoderConfig
from engine.layers.layer_groups import LayerGroups
from engine.runner.kv_storage import block_bytes, kv_dtype
from engine.startup import StartTimes
from tests.engine.families.opened import parse
from tests.engine.tiny import make_text, rewrite_tensors
from tests.engine.weights.checkpoints import Rank, load

TOKENS = 10
PROMPTS = ("the quick brown fox jumps over the lazy dog. what is shown?", "hello world 0 1 2 3 4 5 6")
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
OPTIONS = {"max_model_len": 256, "kv_cache_bytes": 4 << 20, "device": "cpu", "block_size": 4}


class RoundingCache(transformers.DynamicCache):
    """Transformers' cache, which gets keys and values rounded to fp8 with a scale for each layer or head.

    Args:
        scales: of each layer's keys and values; numbers, or tensors of one for each KV head.
    """

    def __init__(self, config, scales) -> None:
        super().__init__(config=config)
        self._scales = scales

    def update(self, keys, values, layer, *arguments, **options):
        both = (
            (each / scale).clamp(-448, 448).to(FP8).float() * scale
            for each, scale in zip((keys, values), map(by_head, self._scales[layer]), strict=True)
        )
        return super().update(*both, layer, *arguments, **options)


def by_head(scale):
    return scale[:, None, None] if isinstance(scale, torch.Tensor) else scale


@torch.inference_mode()
def reference(path, prompt, scales):
    """Greedy tokens, and their log-probabilities."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = transformers.PreTrainedTokenizerFast.from_pretrained(path)(prompt, return_tensors="pt").input_ids
    cache, found = RoundingCache(model.config, scales), []
    for _ in range(TOKENS):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(-1)
        ids = logits.argmax()[None, None]
        found.append((int(ids), float(logits.amax())))
    return found


def answers(llm):
    outputs = llm.generate(list(PROMPTS), GREEDY, use_tqdm=False)
    return [
        [(token, chosen[token].logprob) for token, chosen in zip(o.token_ids, o.logprobs, strict=True)]
        for o in (output.outputs[0] for output in outputs)
    ]


def assert_near(found, expected):
    for answer, other in zip(found, expected, strict=True):
        assert [token for token, _ in answer] == [token for token, _ in other]
        assert [p for _, p in answer] == pytest.approx([p for _, p in other], rel=2e-3, abs=2e-3)


def with_scales(path, layers, heads=None):
    """Add scales to a checkpoint, in both of their names; with ``heads`` one for each KV head."""
    factors = torch.tensor(1.0) if heads is None else torch.arange(1.0, heads + 1) ** 2
    scales = [(0.01 * (layer + 1) * factors, 0.02 * (layer + 2) * factors) for layer in range(layers)]

    def change(tensors):
        made = dict(tensors)
        for layer, (key, value) in enumerate(scales):
            prefix = f"model.layers.{layer}.self_attn."
            names = ("k_scale", "v_scale") if layer % 2 else ("k_proj.k_scale", "v_proj.v_scale")
            wide = (1,) if heads is None else (heads, 1, 1)
            made |= {prefix + names[0]: key, prefix + names[1]: value.reshape(wide)}
        return made

    rewrite_tensors(path, change)
    return scales if heads else [(float(key), float(value)) for key, value in scales]


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
@pytest.mark.parametrize("scaled", ["no", "by layer", "by head"])
def test_answers_are_those_of_a_rounding_cache(tmp_path, kind, scaled):
    path = make_text(tmp_path / "model", kind)
    scales = [(1.0, 1.0)] * 2
    exact = answers(LLM(str(path), **OPTIONS))
    if scaled != "no":
        scales = with_scales(path, 2, 2 if scaled == "by head" else None)
    expected = [reference(path, prompt, scales) for prompt in PROMPTS]
    llm = LLM(str(path), kv_cache_dtype="fp8", **OPTIONS)
    assert_near(answers(llm), expected)
    # Again, from the prefix cache; and in chunks.
    assert_near(answers(llm), expected)
    llm.check_integrity()
    assert_near(answers(LLM(str(path), kv_cache_dtype="fp8", max_num_batched_tokens=7, **OPTIONS)), expected)
    # Rounding changes log-probabilities by more than the tolerance.
    pairs = [pair for both in zip(expected, exact, strict=True) for pair in zip(*both, strict=True)]
    changes = [abs(rounded - other) for (_, rounded), (_, other) in pairs]
    assert max(changes) > 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scales_of_heads_on_a_gpu(tmp_path):
    """A key that is rounded from other last bits may become its neighbour, so answers are only near."""
    path = make_text(tmp_path / "model", "qwen3")
    scales = with_scales(path, 2, 2)
    expected = [reference(path, prompt, scales) for prompt in PROMPTS]
    llm = LLM(str(path), kv_cache_dtype="fp8", **{**OPTIONS, "device": "cuda", "block_size": 16})
    first = [(ours[0], theirs[0]) for ours, theirs in zip(answers(llm), expected, strict=True)]
    assert all(ours[0] == theirs[0] and abs(ours[1] - theirs[1]) < 0.02 for ours, theirs in first)
    llm.check_integrity()


def test_ranks_have_the_scales_of_their_heads(tmp_path):
    path = make_text(tmp_path / "model", "qwen3")
    scales = with_scales(path, 2, 2)
    for rank_number in range(2):
        layer = load(path, Rank(rank_number, 2)).layers[1].self_attn
        wanted = torch.stack([each[rank_number] for each in scales[1]])
        assert torch.equal(layer.head_scales[:, 0], wanted) and layer.kv_scales() == (1, 1)


@pytest.mark.parametrize("heads", [None, 2])
def test_scales_are_not_used_otherwise(tmp_path, heads):
    path = make_text(tmp_path / "model", "qwen3")
    expected = answers(LLM(str(path), **OPTIONS))
    with_scales(path, 2, heads)
    assert_near(answers(LLM(str(path), **OPTIONS)), expected)


def test_twice_as_many_tokens_fit(tmp_path):
    path = make_text(tmp_path / "model", "qwen3")
    decoder = parse(path)[1].decoder
    assert isinstance(decoder, DecoderConfig)
    config = EngineConfig(model=str(path), kv_cache_dtype="fp8")
    # Keys and values of 2 layers, 2 heads, 16 tokens and 32 numbers, a byte each.
    groups = LayerGroups.single(decoder)
    assert block_bytes(groups, 16, kv_dtype(config, torch.bfloat16)) == 2 * 2 * 2 * 16 * 32
    auto = EngineConfig(model=str(path))
    assert block_bytes(groups, 16, kv_dtype(auto, torch.bfloat16)) == 2 * 2 * 2 * 2 * 16 * 32
    blocks = []
    for options in ({}, {"kv_cache_dtype": "fp8"}):
        config = EngineConfig(
            model=str(path), device="cpu", dtype="bfloat16", kv_cache_bytes=1 << 20, **options
        )
        checkpoint = Checkpoint.open(str(path))
        model = resolve(checkpoint).parse(checkpoint)
        loaded = rank.ModelRank.load(config, checkpoint, model, SingleProcessGroup(), StartTimes())
        blocks.append(loaded.measure_blocks())
    assert blocks == [128, 256]


def test_a_gpu_that_cannot_read_fp8_is_refused(tmp_path, monkeypatch):
    path = make_text(tmp_path / "model", "qwen3")
    monkeypatch.setattr(rank, "reads_fp8", lambda device: False)
    with pytest.raises(ConfigError, match=r"needs a GPU of compute capability 8\.9") as caught:
        LLM(str(path), kv_cache_dtype="fp8", **OPTIONS)
    assert caught.value.param == "kv_cache_dtype"
