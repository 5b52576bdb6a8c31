"""Draws the mixture of experts of a decoder."""

from __future__ import annotations

from typing import Any

from tests.engine.families.drawn.choices import Draw

#: Kinds whose router chooses among groups.
GROUPED = ("glm4_moe", "glm4v_moe")
ERNIE = ("ernie4_5_moe", "ernie4_5_vl_moe")
EXPERTS = (
    *("deepseek_ocr2", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe"),
    *(*ERNIE, *GROUPED, "cohere2_moe"),
)


def draw_experts(draw: Draw, kind: str, fields: dict[str, Any]) -> None:
    """Add to a decoder's ``fields`` those of its experts; ``kind`` is one of ``EXPERTS``."""
    if kind in GROUPED:
        _draw_grouped(draw, fields)
        return
    if kind in ERNIE:
        _draw_biased(draw, kind, fields)
        return
    if kind == "cohere2_moe":
        _draw_cohere(draw, fields)
        return
    if kind == "deepseek_ocr2":
        _draw_scaled(draw, fields)
        return
    experts = draw.choice("experts", (1, 2, 5, 8, 16))
    fields["num_experts_per_tok"] = draw.choice(
        "experts of a token", [n for n in (1, 2, 3, 8) if n <= experts]
    )
    if kind in ("granitemoe", "mixtral"):
        fields["num_local_experts"] = experts
        return
    # Transformers 5 saves another name.
    fields[draw.choice("experts' name", ("num_experts", "num_local_experts"))] = experts
    if kind in ("qwen2_moe", "qwen3_5_moe"):
        fields["num_experts"] = fields.pop("num_local_experts", experts)
        fields["shared_expert_intermediate_size"] = draw.choice("shared intermediate", (16, 40))
    fields["moe_intermediate_size"] = draw.choice("expert intermediate", (16, 24, 52))
    # The classes of the last two kinds always renormalise.
    if draw.varies("renormalised", 0.5):
        fields["norm_topk_prob"] = draw.choice("renormalise", (True, True, False))
    if kind == "qwen3_5_moe":
        # All layers have experts.
        del fields["intermediate_size"]
        return
    layers = fields["num_hidden_layers"]
    if draw.varies("sparse step stated", 0.4):
        fields["decoder_sparse_step"] = draw.choice("sparse step", (1, 2))
    if draw.varies("dense layers stated", 0.4):
        fields["mlp_only_layers"] = draw.choice("dense layers", ([], [0], [layers - 1]))


def _draw_cohere(draw: Draw, fields: dict[str, Any]) -> None:
    """Add the experts of Cohere 2, the first layers without any, and the pattern of these layers' windows."""
    experts = draw.choice("experts", (2, 5, 8))
    fields |= {
        "num_experts": experts,
        "num_experts_per_tok": draw.choice("experts of a token", [n for n in (1, 2, 3) if n <= experts]),
        "num_shared_experts": draw.choice("shared experts", (0, 1, 2)),
        "shared_expert_combination_strategy": draw.choice("shared experts' part", ("average", "sum")),
        "expert_selection_fn": draw.choice("scores", ("softmax", "sigmoid")),
        "norm_topk_prob": draw.choice("renormalise", (True, True, False)),
        "first_k_dense_replace": draw.choice("dense layers", (0, 1, 1)),
        "prefix_dense_sliding_window_pattern": draw.choice("pattern of dense layers", (1, 2)),
    }
    if draw.varies("dense size stated", 0.5):
        fields["prefix_dense_intermediate_size"] = draw.choice("dense size", (24, 40))
    if draw.varies("RMS norms", 0.4):
        fields["rms_norm_eps"] = draw.choice("eps of RMS norms", (1e-5, 1e-3))
    draw.spelled(fields, "num_shared_experts", "norm_topk_prob")


def _draw_biased(draw: Draw, kind: str, fields: dict[str, Any]) -> None:
    """Add the experts of Ernie 4.5."""
    experts, layers = draw.choice("experts", (2, 5, 8, 16)), fields["num_hidden_layers"]
    sizes = (16, 24, 52)
    fields |= {
        "moe_num_experts": experts,
        "moe_k": draw.choice("experts of a token", [n for n in (1, 2, 3, 8) if n <= experts]),
        "moe_intermediate_size": draw.choice("expert intermediate", sizes),
    }
    if draw.varies("shared experts stated", 0.5):
        fields["moe_num_shared_experts"] = draw.choice("shared experts", (0, 1, 3))
    if kind == "ernie4_5_vl_moe":
        fields["moe_intermediate_size"] = [
            draw.choice(f"expert intermediate {part}", sizes) for part in (0, 1)
        ]
        if draw.varies("layer types", 0.5):
            rng = draw.stream("layer types")
            types = [rng.choice(("sparse", "dense", "sparse")) for _ in range(layers)]
            # Transformers saves no conversion of a model without experts.
            types[rng.randrange(layers)] = "sparse"
            fields["mlp_layer_types"] = types
    elif draw.varies("sparse layers stated", 0.6):
        fields["moe_layer_start_index"] = draw.choice("first sparse layer", (0, 1, layers - 1))
        fields["moe_layer_interval"] = draw.choice("sparse step", (1, 1, 2))
        fields["moe_layer_end_index"] = draw.choice("last sparse layer", (-1, layers - 1, layers, 1))


def _draw_scaled(draw: Draw, fields: dict[str, Any]) -> None:
    """Add the experts of DeepSeek-OCR 2, whose layers are listed."""
    experts = draw.choice("experts", (2, 5, 8, 16))
    fields |= {
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.choice("experts of a token", [n for n in (1, 2, 6) if n <= experts]),
        "moe_intermediate_size": draw.choice("expert intermediate", (16, 24, 52)),
        "mlp_layer_types": [
            draw.choice(f"MLP of layer {layer}", ("sparse", "sparse", "dense"))
            for layer in range(fields["num_hidden_layers"])
        ],
    }
    if draw.varies("shared experts stated", 0.4):
        fields["n_shared_experts"] = draw.choice("shared experts", (1, 2, 3))
    if draw.varies("scaling of experts stated", 0.4):
        fields["routed_scaling_factor"] = draw.choice("scaling of experts", (1.0, 1.5, 2.5))


def _draw_grouped(draw: Draw, fields: dict[str, Any]) -> None:
    """Add the experts of GLM-4.5, of which a group has two or more."""
    groups = draw.choice("groups", (1, 1, 2, 4))
    members = draw.choice("experts of a group", (2, 3, 8))
    kept = draw.choice("kept groups", [n for n in (1, 2, 3) if n <= groups])
    fields |= {
        "n_routed_experts": groups * members,
        "num_experts_per_tok": draw.choice(
            "experts of a token", [n for n in (1, 2, 3, 8) if n <= kept * members]
        ),
        "moe_intermediate_size": draw.choice("expert intermediate", (16, 24, 52)),
    }
    if groups > 1 or draw.varies("groups stated", 0.4):
        fields |= {"n_group": groups, "topk_group": kept}
    if draw.varies("shared experts stated", 0.4):
        fields["n_shared_experts"] = draw.choice("shared experts", (1, 2))
    if draw.varies("scaling of experts stated", 0.4):
        fields["routed_scaling_factor"] = draw.choice("scaling of experts", (1.0, 1.5, 2.5))
    if draw.varies("renormalised", 0.5):
        fields["norm_topk_prob"] = draw.choice("renormalise", (True, True, False))
    if draw.varies("dense layers stated", 0.4):
        fields["first_k_dense_replace"] = draw.choice("dense layers", (0, 1, fields["num_hidden_layers"]))
