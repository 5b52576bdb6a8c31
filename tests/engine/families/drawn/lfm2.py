"""Draws what LFM2's config.json has of its own."""

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
