"""Draws what the config.json of LFM2 and LFM3 has of its own."""

from __future__ import annotations

from typing import Any

from tests.engine.families.drawn.choices import Draw


def draw_short_convs(draw: Draw, fields: dict[str, Any]) -> None:
    """Change ``fields`` of a decoder into those of an LFM2: its layers, its convolutions and its MLPs.

    One layer has attention: Transformers can't generate without.
    """
    layers, rng = fields["num_hidden_layers"], draw.stream("short convolutions")
    kinds = [rng.choice(("conv", "conv", "full_attention")) for _ in range(layers)]
    kinds[rng.randrange(layers)] = "full_attention"
    how = draw.variant("short convolutions spelled", ("list", "indices", "absent"), 0.5)
    if how == "list":
        fields["layer_types"] = kinds
    elif how == "indices":
        fields["full_attn_idxs"] = [layer for layer, kind in enumerate(kinds) if kind != "conv"]
    fields["norm_eps"] = fields.pop("rms_norm_eps")
    # Nothing reads it.
    fields["hidden_act"] = draw.variant("activation stated", ("silu", "gelu"), 0.2)
    fields["conv_L_cache"] = draw.variant("width of short convolutions", (3, 2, 4, 5), 0.5)
    fields["conv_bias"] = draw.variant("biases of short convolutions", (False, True), 0.4)
    fields["block_multiple_of"] = draw.choice("MLP in steps of", (8, 16, 20))
    fields["block_ffn_dim_multiplier"] = draw.variant("factor of the MLP", (1.0, 1.3, 1), 0.5)
    fields["block_auto_adjust_ff_dim"] = draw.variant("MLP is two thirds", (True, False), 0.3)
    draw.spelled(fields, "conv_L_cache", "conv_bias", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim")
    if draw.varies("older names of LFM2", 0.4):
        fields["block_ff_dim"] = fields.pop("intermediate_size")
        fields["tie_embedding"] = fields.pop("tie_word_embeddings")
        if draw.varies("another intermediate size beside it", 0.5):
            fields["intermediate_size"] = 64


def draw_lfm3_decoder(draw: Draw, vocab: int, *, tokens: int) -> dict[str, Any]:
    """Fields of an LFM3. One of its layers has full attention: Transformers can't generate without."""
    heads, layers = draw.choice("heads", (1, 2, 4, 6)), draw.choice("layers", (1, 2, 3, 5))
    rng = draw.stream("layer types")
    kinds = [rng.choice(("conv", "sliding_attention", "full_attention")) for _ in range(layers)]
    kinds[rng.randrange(layers)] = "full_attention"
    fields: dict[str, Any] = {
        "vocab_size": vocab + draw.variant("padded vocabulary", (0, 1, 13, 64), 0.2),
        "hidden_size": draw.choice("hidden", (32, 48, 64)),
        "intermediate_size": draw.choice("intermediate", (32, 48, 96)),
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice("kv heads", [n for n in (1, 2, 3, 4) if heads % n == 0]),
        "head_dim": draw.choice("head dim", (8, 16, 24, 32)),
        "max_position_embeddings": draw.choice("max position", (tokens, 4096)),
        "norm_eps": draw.choice("norm eps", (1e-6, 1e-5, 1e-3)),
        "sliding_window": draw.choice("window", (3, 7, 33, 4096)),
        "conv_L_cache": draw.variant("width of short convolutions", (7, 2, 3, 5), 0.5),
        "conv_bias": draw.variant("biases of short convolutions", (False, True), 0.4),
        "use_sandwich_norm": draw.variant("norms behind", (True, False), 0.3),
        "use_attention_gate": draw.variant("gates of heads", (True, False), 0.3),
        "tie_word_embeddings": draw.variant("tied", (True, False), 0.3),
    }
    if not fields["use_attention_gate"] and draw.varies("attention bias", 0.5):
        fields["attention_bias"] = True
    if draw.varies("rope stated", 0.6):
        full = {"rope_type": "proportional", "rope_theta": draw.choice("theta", (1e6, 1e4))}
        if draw.varies("share stated", 0.7):
            full["partial_rotary_factor"] = draw.choice("share", (0.25, 0.5, 1.0))
        local = {"rope_type": "default", "rope_theta": draw.choice("local theta", (1e4, 300.0))}
        fields["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    names = ("norm_eps", "conv_L_cache", "conv_bias", "use_sandwich_norm", "use_attention_gate")
    draw.spelled(fields, *names, "tie_word_embeddings")
    return fields
