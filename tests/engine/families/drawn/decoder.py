"""Draws the language model's part of a config.json, in all the spellings that Transformers reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.experts import EXPERTS, draw_experts

#: KV heads where a config.json does not say; None: as many as there are attention heads.
_DEFAULT_KV = {
    "llama": None,
    "phi3": None,
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "qwen2_vl": 8,
    "qwen2_5_vl": 8,
    "qwen3_vl": 32,
    "qwen3_5": 4,
    "mixtral": 8,
    "qwen2_moe": 16,
    "qwen3_moe": 4,
    "qwen3_vl_moe": 16,
}
#: Kinds whose heads have 128 or 256 numbers where a config.json does not say.
_HEADS_OF_128 = ("qwen3", "qwen3_vl", "qwen3_5")
_HAS_HEAD_DIM = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
#: The first is the usual one.
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu_new", "swish", "gelu", "relu")
_SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def draw_decoder(
    draw: Draw, kind: str, vocab: int, *, tokens: int, width_of: int = 1, section: bool = False
) -> dict[str, Any]:
    """Fields of a decoder of ``kind``, a key of ``_DEFAULT_KV``.

    Args:
        vocab: number of the tokenizer's tokens.
        tokens: longest sequence that prompts of the family need.
        width_of: number that divides the hidden size.
        section: the rotary embedding has three axes.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab + draw.variant("padded vocabulary", (0, 1, 13, 64), 0.2),
        "intermediate_size": draw.choice("intermediate", (32, 48, 96, 132)),
        "num_hidden_layers": draw.choice("layers", (1, 2, 3, 4), (1, 4, 2, 1)),
        "max_position_embeddings": max(tokens, draw.choice("max position", (tokens, 512, 1024, 4096))),
        "rms_norm_eps": draw.choice("norm eps", (1e-6, 1e-5, 1e-3)),
        "hidden_act": draw.variant("decoder activation", _ACTIVATIONS, 0.15),
        "tie_word_embeddings": draw.variant("tied", (False, True), 0.3),
    }
    if kind == "qwen3_5":
        # The convolution has the same one, and SiLU is supported.
        fields["hidden_act"] = draw.choice("hybrid activation", ("silu", "swish"))
        _linear_layers(draw, fields)
    head_dim = _heads(draw, kind, fields, width_of)
    _biases(draw, kind, fields)
    _windows(draw, kind, fields)
    if kind in EXPERTS:
        draw_experts(draw, kind, fields)
    _rope(draw, kind, fields, head_dim, section)
    draw.spelled(fields, "rms_norm_eps", "hidden_act", "tie_word_embeddings")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    # Scalings of a context that is never reached would be the same as none.
    plain = "factor" not in rope and lengths_of(kind, fields).original is None
    if plain and draw.varies("max position absent", 0.1):
        del fields["max_position_embeddings"]
    return fields


def _heads(draw: Draw, kind: str, fields: dict[str, Any], width_of: int) -> int:
    """Add the numbers of heads and the hidden size, in one of their spellings; the size of a head."""
    heads = draw.choice("heads", (1, 2, 3, 4, 6, 8), (1, 2, 2, 3, 1, 1))
    head_dim = draw.choice("head dim", (8, 12, 16, 24, 32), (1, 1, 4, 1, 2))
    if draw.coarse:
        # On a GPU each size has kernels of its own, which take long to compile.
        heads, head_dim = 8, 32
    if width_of > 1:
        heads = draw.choice("heads of a wide model", (2, 4, 8))
        head_dim = width_of * draw.choice("hidden size in steps", (1, 2)) // heads
    default, ways = _DEFAULT_KV[kind], ["stated", "absent", "null"]
    if kind in ("mistral", "mixtral", "qwen3_moe", "qwen2_moe"):
        ways.remove("null")
    if default and (draw.coarse or width_of > 1):
        # The default number would be too large.
        ways.remove("absent")
    how = draw.variant("kv heads spelled", ways, 0.25)
    if how == "absent" and default:
        heads, head_dim = default * draw.choice("heads per kv head", (1, 2)), 8
    elif how == "stated":
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        fields["num_key_value_heads"] = draw.choice("kv heads", divisors)
    elif how == "null":
        fields["num_key_value_heads"] = None
    fields["num_attention_heads"] = heads
    fields["hidden_size"] = heads * head_dim
    return _head_dim(draw, kind, fields, head_dim) if kind in _HAS_HEAD_DIM else head_dim


def _head_dim(draw: Draw, kind: str, fields: dict[str, Any], head_dim: int) -> int:
    """State the size of a head, or leave it to the reader; the size."""
    heads = fields["num_attention_heads"]
    how = draw.variant("head dim spelled", ("derived", "stated", "null"), 0.4)
    if kind in _HEADS_OF_128:
        # It has no null, and 128 or 256 is meant where it is absent, which is large for many heads.
        how = "derived" if how == "derived" and heads < 32 else "stated"
    if how == "stated":
        fields["hidden_size"] = heads * draw.choice("hidden per head", (8, 16, 20))
        fields["head_dim"] = head_dim
    elif how == "null":
        fields["head_dim"] = None
    elif kind in _HEADS_OF_128:
        return 256 if kind == "qwen3_5" else 128
    return head_dim


def _linear_layers(draw: Draw, fields: dict[str, Any]) -> None:
    """Add the layers with a gated delta net, by a list or an interval, and the sizes of its heads.

    One layer has attention: Transformers can't generate without.
    """
    layers, rng = fields["num_hidden_layers"], draw.stream("linear layers")
    how = draw.choice("linear layers spelled", ("list", "interval", "absent") if layers > 3 else ("list",))
    if how == "list":
        kinds = [
            rng.choice(("linear_attention", "linear_attention", "full_attention")) for _ in range(layers)
        ]
        kinds[rng.randrange(layers)] = "full_attention"
        fields["layer_types"] = kinds
    elif how == "interval":
        fields["full_attention_interval"] = rng.choice((1, 2, 3))
    key_heads = draw.choice("linear key heads", (1, 2, 4))
    fields |= {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw.choice("value heads per key head", (1, 2, 3)),
        "linear_key_head_dim": draw.choice("linear key dim", (8, 16, 24)),
        "linear_value_head_dim": draw.choice("linear value dim", (16, 20, 32)),
        "linear_conv_kernel_dim": draw.variant("linear conv width", (4, 2, 3), 0.4),
    }


@dataclass(frozen=True)
class Lengths:
    """The dependence of rotary frequencies on the length of a sequence.

    Attributes:
        original: longest sequence with the frequencies of short ones; None if they don't depend on it.
        crosses: the reference has an answer for a sequence that grows beyond ``original``. For longrope only
            Phi-3's class has one; others go on with other frequencies and mix keys of both.
    """

    original: int | None = None
    crosses: bool = True


def lengths_of(kind: str, fields: Mapping[str, Any]) -> Lengths:
    """The lengths of a decoder that :func:`draw_decoder` has drawn."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    scaling = rope.get("rope_type", rope.get("type"))
    if scaling == "dynamic":
        return Lengths(fields["max_position_embeddings"])
    if scaling not in ("longrope", "su"):
        return Lengths()
    beside = fields.get("original_max_position_embeddings")
    within = rope.get("original_max_position_embeddings")
    return Lengths(beside or within or fields["max_position_embeddings"], kind == "phi3")


def nested_lengths_of(kind: str, fields: Mapping[str, Any]) -> Lengths:
    """The lengths of a decoder inside of another model, which doesn't compute again for other frequencies."""
    return replace(lengths_of(kind, fields), crosses=False) if kind == "phi3" else lengths_of(kind, fields)


def _biases(draw: Draw, kind: str, fields: dict[str, Any]) -> None:
    if kind in ("llama", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "qwen3_5") and draw.varies(
        "attention bias", 0.2
    ):
        fields["attention_bias"] = True
    if kind == "llama" and draw.varies("mlp bias", 0.2):
        fields["mlp_bias"] = True
    if kind == "mistral" and draw.varies("bias stated", 0.1):
        # Its class has none.
        fields["attention_bias"] = True


def _windows(draw: Draw, kind: str, fields: dict[str, Any]) -> None:
    """Sliding windows, with the switches and the lists of layers that turn them on and off."""
    window = draw.choice("window", (3, 7, 16, 33))
    layers = fields["num_hidden_layers"]
    if kind in ("mistral", "mixtral", "phi3"):
        how = draw.variant("window spelled", ("null", "stated", "absent"), 0.6)
        if how != "absent":
            fields["sliding_window"] = window if how == "stated" else None
        return
    if kind not in ("qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"):
        return
    if draw.varies("window stated", 0.5):
        fields["sliding_window"] = draw.variant("window null", (window, None), 0.2)
    if draw.varies("window switch stated", 0.6):
        fields["use_sliding_window"] = draw.choice("window switch", (True, True, False))
    if draw.varies("window layers stated", 0.6):
        fields["max_window_layers"] = draw.integer("window layers", 0, layers)
    how = draw.variant("layer types spelled", ("absent", "null", "stated"), 0.4)
    if how == "null":
        fields["layer_types"] = None
    elif how == "stated":
        rng = draw.stream("layer types")
        kinds = (
            ["full_attention", "sliding_attention"]
            if fields.get("use_sliding_window")
            else ["full_attention"]
        )
        if fields.get("sliding_window", 1) is None:
            kinds = ["full_attention"]
        fields["layer_types"] = [rng.choice(kinds) for _ in range(layers)]


def _rope(draw: Draw, kind: str, fields: dict[str, Any], head_dim: int, section: bool) -> None:
    """Rotary fields: the old spelling beside a ``rope_scaling``, or Transformers 5's ``rope_parameters``."""
    scalings = ("default", "longrope") if kind == "phi3" else _SCALINGS
    scaling = draw.variant("rope scaling", scalings, 0.4)
    if section and scaling in ("llama3", "longrope"):
        scaling = "yarn"
    rotated = head_dim
    rope: dict[str, Any] = {}
    if kind == "phi3" and head_dim % 16 == 0 and draw.varies("partial rotary", 0.3):
        fields["partial_rotary_factor"] = 0.75
        rotated = int(head_dim * 0.75)
    if kind == "qwen3_5":
        share = draw.choice("rotated share", (0.25, 0.5, 1.0))
        share = share if int(head_dim * share) % 2 == 0 else 0.5
        if share != 0.25 or draw.varies("rotated share stated", 0.7):
            rope["partial_rotary_factor"] = share
        rotated = int(head_dim * share)
    if scaling != "default":
        rope.update(_scaling(draw, kind, scaling, fields, rotated))
    if section:
        rope["mrope_section"] = _section(draw, rotated // 2)
        if kind in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5"):
            rope["mrope_interleaved"] = True
    theta = draw.choice("rope theta", (1e4, 5e5, 1e6, 1e3))
    new = draw.varies("rope in the new spelling", 0.4)
    name = "rope_type" if new else draw.choice("rope type's name", ("type", "rope_type"))
    if section and scaling == "default" and not new:
        # The later classes have never had the old name.
        later = kind in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")
        rope[name] = "default" if later else draw.choice("mrope's name", ("mrope", "default"))
    elif scaling != "default" or new:
        rope[name] = scaling
    if draw.varies("rope theta absent", 0.1):
        theta = None
    if new:
        fields["rope_parameters"] = {**rope, **({"rope_theta": theta} if theta else {})}
        return
    if theta:
        fields["rope_theta"] = int(theta) if draw.varies("rope theta an integer", 0.3) else theta
    if rope:
        fields["rope_scaling"] = rope
    elif draw.varies("rope scaling null", 0.4):
        fields["rope_scaling"] = None


def _scaling(draw: Draw, kind: str, scaling: str, fields: dict[str, Any], rotated: int) -> dict[str, Any]:
    """The fields of one kind of scaling. Its original context is short, so that prompts go beyond it."""
    factor = draw.choice("rope factor", (2.0, 4.0, 8.0, 1.5))
    original = draw.choice("original context", (16, 32, 64, 128))
    if scaling in ("linear", "dynamic"):
        if scaling == "dynamic" or draw.varies("stretched context", 0.3):
            fields["max_position_embeddings"] = math.ceil(fields["max_position_embeddings"] / factor)
        return {"factor": factor}
    if scaling == "longrope":
        return _longrope(draw, kind, fields, original, rotated)
    found: dict[str, Any] = {"factor": factor}
    if draw.varies("original context absent", 0.2):
        pass
    else:
        found["original_max_position_embeddings"] = original
    if scaling == "llama3":
        return {**found, "low_freq_factor": 1.0, "high_freq_factor": draw.choice("high freq", (4.0, 2.0))}
    if draw.varies("yarn betas", 0.3):
        found |= {
            "beta_fast": draw.choice("beta fast", (32, 16.0, 4)),
            "beta_slow": draw.choice("beta slow", (1, 2)),
        }
    how = draw.variant("yarn attention", ("derived", "stated", "mscale", "one mscale"), 0.4)
    if how == "stated":
        found["attention_factor"] = 0.9
    elif how == "mscale":
        found |= {"mscale": 0.7, "mscale_all_dim": draw.choice("mscale all", (1.0, 0.5))}
    elif how == "one mscale":
        found["mscale"] = 0.7
    if draw.varies("yarn truncate", 0.2):
        found["truncate"] = False
    return found


def _longrope(draw: Draw, kind: str, fields: dict[str, Any], original: int, rotated: int) -> dict[str, Any]:
    rng = draw.stream("longrope factors")
    found: dict[str, Any] = {
        "short_factor": [round(rng.uniform(1.0, 1.5), 3) for _ in range(rotated // 2)],
        "long_factor": [round(rng.uniform(1.5, 9.0), 3) for _ in range(rotated // 2)],
    }
    # Phi-3's class takes the field beside the dictionary, and its own default rather than one within.
    where = "beside" if kind == "phi3" else "within"
    target = fields if where == "beside" else found
    target["original_max_position_embeddings"] = original
    if draw.varies("longrope factor", 0.2):
        found["factor"] = 3.0
    if draw.varies("longrope attention factor", 0.2):
        found["attention_factor"] = 1.1
    return found


def _section(draw: Draw, angles: int) -> list[int]:
    rng = draw.stream("mrope section")
    first, second = sorted(rng.sample(range(1, angles), 2)) if angles > 2 else (1, 1)
    return [first, second - first, angles - second]
