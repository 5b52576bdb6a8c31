"""Draws CLIP and SigLIP towers, connectors, and what the processors of several families have in common."""

from __future__ import annotations

from typing import Any

from tests.engine.families.drawn.choices import Draw

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def draw_sizes(draw: Draw, *, side: int, patch: int) -> dict[str, Any]:
    """Sizes of ``vision_config``: of a tower for crops of ``side`` pixels with patches of ``patch``."""
    heads = draw.choice("tower heads", (1, 2, 3, 4))
    return {
        "hidden_size": heads * draw.choice("tower head dim", (24, 32) if draw.coarse else (8, 16, 24)),
        "intermediate_size": 64 if draw.coarse else draw.choice("tower intermediate", (24, 48, 64)),
        "num_hidden_layers": draw.integer("tower layers", 2, 4),
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
    }


def draw_tower(draw: Draw, *, side: int, patch: int) -> dict[str, Any]:
    """``vision_config`` of a tower; arguments as of :func:`draw_sizes`."""
    fields = draw_sizes(draw, side=side, patch=patch)
    act = draw.variant("tower activation", ("", "quick_gelu", "gelu", "gelu_pytorch_tanh", "relu"), 0.3)
    if act:
        fields["hidden_act"] = act
    if draw.varies("tower norm eps", 0.3):
        fields["layer_norm_eps"] = 1e-3
    return fields


def draw_pixtral(draw: Draw, *, longest: int, patch: int) -> dict[str, Any]:
    """``vision_config`` of a Pixtral tower for images of up to ``longest`` pixels a side, with patches of
    ``patch``."""
    tower = draw_tower(draw, side=longest, patch=patch)
    tower.pop("layer_norm_eps", None)
    return {**tower, **draw_theta(draw), "model_type": "pixtral"}


def draw_theta(draw: Draw, chance: float = 0.4) -> dict[str, Any]:
    """The field of ``vision_config`` that states the base of a rotary embedding, if one does."""
    how = draw.variant("tower theta", ("absent", "old spelling", "new spelling"), chance)
    if how == "old spelling":
        return {"rope_theta": 500.0}
    if how == "new spelling":
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}}
    return {}


def draw_side(draw: Draw) -> tuple[int, int]:
    """Side of a crop and of a patch, in pixels; some crops end within a patch."""
    patch = draw.choice("patch", (4, 6, 7, 8))
    rest = draw.variant("pixels without a patch", (0, 1, patch - 1), 0.3)
    return patch * draw.integer("patches per side", 2, 5) + rest, patch


def draw_pixels(draw: Draw) -> dict[str, Any]:
    """Fields of preprocessor_config.json that say how pixels become numbers."""
    found: dict[str, Any] = {}
    rng = draw.stream("pixels")
    if draw.varies("mean and std", 0.3):
        found["image_mean"] = [round(rng.uniform(0.3, 0.6), 4) for _ in range(3)]
        found["image_std"] = [round(rng.uniform(0.2, 0.6), 4) for _ in range(3)]
    if draw.varies("filter", 0.25):
        found["resample"] = rng.choice(list(_FILTERS.values()))
    if draw.varies("rescale factor", 0.15):
        found["rescale_factor"] = rng.choice((1 / 255, 0.00392156862745098, 1 / 127.5))
    if draw.varies("steps stated", 0.3):
        found |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    if draw.varies("step left out", 0.1):
        found[rng.choice(("do_rescale", "do_normalize"))] = False
    return found


def draw_feature_layer(draw: Draw, layers: int, plain: int) -> Any:
    """``vision_feature_layer``: an index from either end, or a list of indices."""
    how = draw.variant("feature layer", ("plain", "another", "list"), 0.4)
    rng = draw.stream("feature layers")
    if how == "plain":
        return plain
    if how == "another":
        return rng.choice([*range(1, layers + 1), *range(-layers, 0)])
    return [rng.choice([*range(1, layers + 1), *range(-layers, 0)]) for _ in range(rng.randint(1, 3))]


def draw_connector(draw: Draw, raw: dict[str, Any]) -> None:
    """Add the fields of an MLP connector to config.json."""
    if draw.varies("connector activation", 0.3):
        names = ("gelu", "gelu_pytorch_tanh", "relu", "quick_gelu", "silu", "gelu_fast")
        raw["projector_hidden_act"] = draw.choice("connector's activation", names)
    if draw.varies("connector bias stated", 0.3):
        raw["multimodal_projector_bias"] = draw.choice("connector bias", (True, False))


def hub_name(name: str) -> str:
    """The name of a tensor in public LLaVA checkpoints, from the name that Transformers saves."""
    prefix = "vision_tower."
    return name.replace(prefix, prefix + "vision_model.", 1) if name.startswith(prefix) else name
