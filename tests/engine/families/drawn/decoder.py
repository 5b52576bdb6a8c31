"""Draws the language model's part of a config.json, in all the spellings that Transformers reads."""

from __future__ import annotations

from typing import Any

from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.experts import EXPERTS, draw_experts
from tests.engine.families.drawn.lfm2 import draw_short_convs
from tests.engine.families.drawn.rope import draw_rope, lengths_of
from tests.engine.tiny import DELTA_NETS, TRANSFORMERS

#: KV heads where a config.json does not say; None: as many as there are attention heads.
_DEFAULT_KV = {
    "cohere": None,
    "cohere2": None,
    "cohere2_moe": None,
    "lfm2": 8,
    "llama": None,
    "phi3": None,
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "qwen2_vl": 8,
    "qwen2_5_vl": 8,
    "qwen3_vl": 32,
    "qwen3_5": 4,
    "qwen3_5_moe": 2,
    "mixtral": 8,
    "qwen2_moe": 16,
    "qwen3_moe": 4,
    "qwen3_vl_moe": 16,
    "gemma": 16,
    "granite": None,
    "hyperclovax": None,
    "granitemoe": None,
    "ministral3": 8,
    "glm": 2,
    "glm4": 2,
    "glm4_moe": 8,
    "glm4v": 2,
    "glm4v_moe": 8,
    "glm_ocr": 8,
    "paddleocr_vl": 2,
    "ernie4_5": 2,
    **dict.fromkeys(("ernie4_5_moe", "ernie4_5_vl_moe"), 4),
    "exaone4": 32,
    "seed_oss": 8,
    "smollm3": 4,
    "molmo2": 8,
    "muse_glimmer": 2,
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_vl", "deepseek_ocr2", "olmo2", "olmo3"), None),
}
#: Numbers of a head where a config.json does not say, by the kinds that don't derive them.
_DEFAULT_HEAD_DIM = {
    "cohere2_moe": 128,
    "qwen3": 128,
    "qwen3_vl": 128,
    "qwen3_5": 256,
    "qwen3_5_moe": 256,
    "gemma": 256,
    "glm": 128,
    "glm4": 128,
    "ministral3": 128,
    "paddleocr_vl": 128,
    "ernie4_5": 128,
    "seed_oss": 128,
    "molmo2": 128,
    "muse_glimmer": 128,
}
_HAS_HEAD_DIM = (
    *("ernie4_5_moe", "ernie4_5_vl_moe", "hunyuan_v1_dense", "hunyuan_vl"),
    *("hyperclovax", "llama", "mistral", "mixtral", "qwen3_moe", "qwen3_vl_moe", "glm_ocr"),
    *("glm4_moe", "glm4v_moe"),
    *_DEFAULT_HEAD_DIM,
)
#: Kinds that take no null for the number of KV heads.
_COUNTED_KV = (
    *("mistral", "mixtral", "qwen3_moe", "qwen2_moe", "gemma"),
    *("ernie4_5_moe", "ernie4_5_vl_moe", "glm4", "glm4_moe", "glm4v_moe"),
    *("exaone4", "ministral3", "glm_ocr", "lfm2", "molmo2", "muse_glimmer", *DELTA_NETS, "qwen3_vl_moe"),
)
_BIASED = (
    *("llama", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", *DELTA_NETS),
    *(
        "cohere",
        "cohere2",
        "cohere2_moe",
        "gemma",
        "granite",
        "granitemoe",
        "hyperclovax",
        "glm4_moe",
        "hunyuan_v1_dense",
        "hunyuan_vl",
    ),
    *("molmo2", "deepseek_ocr2", "olmo2", "olmo3"),
)
#: Scalings whose functions in Transformers take no null for the size of a head.
_SIZED = ("dynamic", "yarn", "longrope")
#: The first is the usual one.
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu_new", "swish", "gelu", "relu")


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
    if kind == "gemma" and fields["hidden_act"] == "gelu" and TRANSFORMERS < (5, 23):
        # These releases compute what the name says, later ones what Gemma was trained with.
        fields["hidden_act"] = "gelu_pytorch_tanh"
    if kind in DELTA_NETS:
        # The convolution has the same one, and SiLU is supported.
        fields["hidden_act"] = draw.choice("hybrid activation", ("silu", "swish"))
        _linear_layers(draw, fields)
    head_dim = _heads(draw, kind, fields, width_of)
    _biases(draw, kind, fields)
    _windows(draw, kind, fields)
    if kind in ("cohere", "cohere2", "cohere2_moe"):
        fields["layer_norm_eps"] = fields.pop("rms_norm_eps")
    if kind in EXPERTS:
        draw_experts(draw, kind, fields)
    if kind in ("cohere", "cohere2", "cohere2_moe"):
        fields["logit_scale"] = draw.choice("logit scale", (2.0, 0.25, 5 / 6))
        draw.spelled(fields, "layer_norm_eps", "logit_scale")
    if kind in ("granite", "granitemoe", "hyperclovax"):
        _multipliers(draw, fields)
    if kind == "hyperclovax" and draw.varies("norms behind stated", 0.5):
        fields["use_post_norm"] = draw.choice("norms behind", (True, False))
    if kind == "lfm2":
        draw_short_convs(draw, fields)
    if kind == "muse_glimmer":
        _muse_factors(draw, fields)
    draw_rope(draw, kind, fields, head_dim, section)
    if kind == "mixtral" and _scaling_of(fields) in _SIZED and not fields.get("head_dim"):
        # It is null by default there.
        fields["head_dim"] = head_dim
    draw.spelled(fields, "rms_norm_eps", "norm_eps", "hidden_act", "tie_word_embeddings", "tie_embedding")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    # Scalings of a context that is never reached would be the same as none.
    plain = "factor" not in rope and lengths_of(kind, fields).original is None
    if plain and draw.varies("max position absent", 0.1):
        del fields["max_position_embeddings"]
    return fields


def _scaling_of(fields: dict[str, Any]) -> str:
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    return rope.get("rope_type", rope.get("type", "default"))


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
    if kind in _COUNTED_KV:
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
    if kind not in _HAS_HEAD_DIM:
        return head_dim
    return _head_dim(draw, kind, fields, head_dim, fixed_width=width_of > 1)


def _head_dim(draw: Draw, kind: str, fields: dict[str, Any], head_dim: int, *, fixed_width: bool) -> int:
    """State the size of a head, or leave it to the reader; the size.

    Args:
        fixed_width: keep the hidden size.
    """
    heads = fields["num_attention_heads"]
    how = draw.variant("head dim spelled", ("derived", "stated", "null"), 0.4)
    if kind in ("ernie4_5_vl_moe", "qwen3_moe") and how == "null":
        # Transformers' classes multiply by the null.
        how = "stated"
    if kind in ("hunyuan_v1_dense", "hunyuan_vl"):
        # Their class derives nothing.
        how = "stated"
    if kind in _DEFAULT_HEAD_DIM and (how != "null" or kind != "paddleocr_vl"):
        # It has no null, and 128 or 256 is meant where it is absent, which is large for many heads.
        how = "derived" if how == "derived" and heads < 32 else "stated"
    if how == "stated":
        if fixed_width:
            head_dim = draw.choice("head dim beside the width", (16, 32))
        else:
            fields["hidden_size"] = heads * draw.choice("hidden per head", (8, 16, 20))
        fields["head_dim"] = head_dim
    elif how == "null" and kind != "glm_ocr":
        fields["head_dim"] = None
    elif kind in _DEFAULT_HEAD_DIM:
        return _DEFAULT_HEAD_DIM[kind]
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


def _biases(draw: Draw, kind: str, fields: dict[str, Any]) -> None:
    if kind in _BIASED and draw.varies("attention bias", 0.2):
        fields["attention_bias"] = True
    if kind in ("llama", "granite", "hyperclovax") and draw.varies("mlp bias", 0.2):
        fields["mlp_bias"] = True
    if kind in ("glm", "glm4", "glm4v_moe") and draw.varies("attention bias stated", 0.4):
        fields["attention_bias"] = draw.choice("attention bias", (True, False))
    if kind in ("cohere", "glm4_moe") and draw.varies("norms of queries and keys stated", 0.6):
        fields["use_qk_norm"] = draw.choice("norms of queries and keys", (True, False))
    if kind == "seed_oss" and draw.varies("biases of Seed-OSS", 0.4):
        fields |= {"attention_bias": draw.choice("bias", (True, False)), "attention_out_bias": True}
    if kind == "smollm3" and draw.varies("layers that rotate", 0.6):
        rng = draw.stream("layers that rotate")
        fields["no_rope_layers"] = [rng.choice((0, 1)) for _ in range(fields["num_hidden_layers"])]
    if kind in ("ernie4_5", "paddleocr_vl") and draw.varies("biases", 0.3):
        fields["use_bias"] = True
    if kind in ("mistral", "glm4v") and draw.varies("bias stated", 0.1):
        # Mistral's class has none, and GLM's has those that it has.
        fields["attention_bias"] = True


def _multipliers(draw: Draw, fields: dict[str, Any]) -> None:
    """Add Granite's factors of embeddings, attention, residuals and logits. An absent one means 1."""
    fields |= {
        "embedding_multiplier": draw.choice("embedding multiplier", (3.0, 12, 0.5)),
        "logits_scaling": draw.choice("logits scaling", (2.5, 8, 0.7)),
        "residual_multiplier": draw.choice("residual multiplier", (0.4, 0.22, 1)),
        "attention_multiplier": draw.choice("attention multiplier", (0.5, 0.0625, 0.2)),
    }
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    draw.spelled(fields, *names)


def _muse_factors(draw: Draw, fields: dict[str, Any]) -> None:
    """Add Muse Glimmer's factors, its bound of logits, and the layers that rotate."""
    fields["hidden_activation"] = fields.pop("hidden_act")
    fields |= {
        "final_logit_softcapping": draw.choice("bound of logits", (20.0, 5.0)),
        "qk_scale_factor": draw.choice("factor of queries", (3.87, 1.0)),
        "output_multiplier": draw.choice("factor of logits", (0.19611613513818404, 0.5, 1.0)),
        "post_norm_eps": draw.choice("eps of norms behind", (1e-8, 1e-3)),
    }
    names = ("final_logit_softcapping", "qk_scale_factor", "output_multiplier", "post_norm_eps")
    draw.spelled(fields, "hidden_activation", *names)
    if draw.varies("layers that rotate", 0.4):
        rng = draw.stream("layers that rotate")
        fields["layer_rope_theta"] = [rng.choice((0, 1e4)) for _ in range(fields["num_hidden_layers"])]


def _windows(draw: Draw, kind: str, fields: dict[str, Any]) -> None:
    """Sliding windows, with the switches and the lists of layers that turn them on and off."""
    window = draw.choice("window", (3, 7, 16, 33))
    layers = fields["num_hidden_layers"]
    if kind in ("mistral", "mixtral", "ministral3", "phi3"):
        how = draw.variant("window spelled", ("null", "stated", "absent"), 0.6)
        if how != "absent":
            fields["sliding_window"] = window if how == "stated" else None
        return
    if kind in ("olmo3", "muse_glimmer"):
        fields["sliding_window"] = window
        if draw.varies("layer types stated", 0.5):
            rng = draw.stream("layer types")
            kinds = ("sliding_attention", "full_attention")
            fields["layer_types"] = [rng.choice(kinds) for _ in range(layers)]
        return
    if kind in ("cohere2", "cohere2_moe", "exaone4"):
        fields["sliding_window"] = window
        if kind == "exaone4" and draw.varies("no windows", 0.3):
            fields |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
            return
        how = draw.choice("layers spelled", ("pattern", "types", "neither"))
        if how == "pattern":
            fields["sliding_window_pattern"] = draw.choice("pattern", (1, 2, 3))
        elif how == "types":
            rng = draw.stream("layer types")
            kinds = ("sliding_attention", "full_attention")
            fields["layer_types"] = [rng.choice(kinds) for _ in range(layers)]
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
