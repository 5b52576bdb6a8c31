"""CLIP and SigLIP towers: their configurations, and the names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import integer, number, vision_activation
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig

_CLIP_DEFAULTS: dict[str, Any] = {
    # CLIP ViT-L/14-336. LLaVA's files describe it in part, Phi-3.5-vision's not at all.
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_DEFAULTS: dict[str, Any] = {
    # The defaults of Transformers' SiglipVisionConfig.
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


@dataclass(frozen=True, slots=True)
class SquareTower:
    """A tower for square images of one size.

    Attributes:
        config: the transformer.
        image_size: side of an image in pixels.
        patch_size: side of a patch in pixels.
    """

    config: VisionConfig
    image_size: int
    patch_size: int

    @property
    def grid_side(self) -> int:
        """Patches along an image's side."""
        return self.image_size // self.patch_size

    def crops(
        self, *, out_features: int, normalisation: Normalisation, drop_first: bool = False, **connector: Any
    ) -> CropVisionConfig:
        """The configuration of an encoder with this tower; arguments are its attributes."""
        return CropVisionConfig(
            tower=self.config,
            image_size=self.image_size,
            patch_size=self.patch_size,
            drop_first=drop_first,
            out_features=out_features,
            normalisation=normalisation,
            **connector,
        )


def parse_clip(raw: Mapping[str, Any], *, feature_layer: Any) -> SquareTower:
    """A CLIP tower up to the last layer whose output is used.

    Args:
        raw: ``vision_config``.
        feature_layer: ``vision_feature_layer``: an index into the tower's hidden states, or a list of indices
            of those to be concatenated; 0 is the embeddings, a negative index counts from the end.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    return _parse({**_CLIP_DEFAULTS, **_stated(raw)}, feature_layer, clip=True)


def parse_siglip(
    raw: Mapping[str, Any], *, feature_layer: Any = None, defaults: Mapping[str, Any] | None = None
) -> SquareTower:
    """A SigLIP tower; arguments and errors as :func:`parse_clip`.

    Args:
        feature_layer: None for the tower's normalised last output.
        defaults: the family's, before SigLIP's own.
    """
    return _parse({**_SIGLIP_DEFAULTS, **(defaults or {}), **_stated(raw)}, feature_layer, clip=False)


def feature_states(feature_layer: Any, layers: int) -> tuple[int, tuple[int, ...]]:
    """The number of layers to run, and :attr:`VisionConfig.features`, for ``vision_feature_layer``.

    Raises:
        CheckpointError: an index is not in a tower of ``layers`` layers.
    """
    stated = feature_layer if isinstance(feature_layer, list) else [feature_layer]
    valid = all(isinstance(index, int) and -layers - 1 <= index <= layers for index in stated)
    states = tuple(index % (layers + 1) for index in stated) if valid else ()
    if not any(states):
        raise CheckpointError(
            f"config.json: vision_feature_layer {feature_layer!r} is not in a tower of {layers} layers",
            param="vision_feature_layer",
        )
    return max(states), states if len(states) > 1 else ()


def require_squares(side: int, factor: int, field: str, stated: str | None = None) -> None:
    """Refuse squares of ``factor`` by ``factor`` patches that don't fill an image of ``side`` by ``side``.

    Args:
        field: of config.json, which states ``factor``.
        stated: the field's value, where that is not ``factor`` itself.

    Raises:
        CheckpointError: naming the field.
    """
    if side % factor:
        raise CheckpointError(
            f"config.json: {field} {stated or factor} does not divide the {side} patches per side",
            param=field,
        )


def axial_theta(raw: Mapping[str, Any]) -> float:
    """The base of a tower's two-dimensional rotary embedding, which ``vision_config`` (``raw``) may state.

    Raises:
        CheckpointError: the base is no number, or the embedding is of another type.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    stated = raw.get(field) or {}
    if not isinstance(stated, Mapping):
        raise CheckpointError(
            f"config.json: {field} of the vision part should be an object", param="vision_config"
        )
    kind = stated.get("rope_type", stated.get("type", "axial"))
    if kind not in ("axial", "default"):
        raise CheckpointError(
            f"config.json: rope type {kind!r} of the vision part is not supported; axial is",
            param="vision_config",
        )
    beside = raw.get("rope_theta")
    return number({"rope_theta": 10000.0 if beside is None else beside, **stated}, "rope_theta")


def _stated(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}


def _parse(filled: Mapping[str, Any], feature_layer: Any, *, clip: bool) -> SquareTower:
    layers = integer(filled, "num_hidden_layers")
    used, features = (layers, ()) if feature_layer is None else feature_states(feature_layer, layers)
    if integer(filled, "num_channels") != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    image, patch = integer(filled, "image_size"), integer(filled, "patch_size")
    tower = VisionConfig(
        hidden_size=integer(filled, "hidden_size"),
        intermediate_size=integer(filled, "intermediate_size"),
        num_layers=used,
        stored_layers=layers,
        num_heads=integer(filled, "num_attention_heads"),
        patch_dim=3 * patch * patch,
        patch_bias=not clip,
        activation=vision_activation(filled["hidden_act"]),
        norm_eps=number(filled, "layer_norm_eps"),
        class_token=clip,
        num_positions=(image // patch) ** 2 + clip,
        pre_norm=clip,
        post_norm=feature_layer is None,
        features=features,
    )
    return SquareTower(tower, image, patch)


def tower_rules(prefix: str, module: str = "tower.") -> tuple[tuple[str, str], ...]:
    """Rename rules of a CLIP or SigLIP tower; both have the same names.

    Args:
        prefix: regular expression, without groups, of the part of a name before the tower's own names.
        module: the tower's place in the encoder.
    """
    layer = prefix + r"encoder\.layers\.(\d+)\."
    block = module + r"blocks.\1."
    return (
        (prefix + r"embeddings\.class_embedding", module + "class_embedding"),
        (prefix + r"embeddings\.patch_embedding\.(.*)", module + r"patch_embed.\1"),
        (prefix + r"embeddings\.position_embedding\.weight", module + "position_embedding"),
        (prefix + r"pre_layrnorm\.(.*)", module + r"pre_norm.\1"),
        (prefix + r"post_layernorm\.(.*)", module + r"post_norm.\1"),
        (layer + r"layer_norm([12])\.(.*)", block + r"norm\2.\3"),
        (layer + r"self_attn\.out_proj\.(.*)", block + r"attn.proj.\2"),
        (layer + r"self_attn\.([qkv]_proj\..*)", block + r"attn.\2"),
        (layer + r"mlp\.(.*)", block + r"mlp.\2"),
    )


def unused_tensors(prefix: str, tower: VisionConfig) -> tuple[str, ...]:
    """Names to ignore: layers after the last one that is run, an unused last norm, SigLIP's pooling head, and
    position indices."""
    return (
        prefix + r"embeddings\.position_ids",
        prefix + r"head\..*",
        *unused_layers(prefix + r"encoder\.layers\.", tower),
        *(() if tower.post_norm else (prefix + r"post_layernorm\..*",)),
    )


def unused_layers(prefix: str, tower: VisionConfig) -> tuple[str, ...]:
    """Names to ignore: the layers after the last one that is run.

    Args:
        prefix: regular expression of the part of a name before the layer's number.
    """
    beyond = "|".join(str(index) for index in range(tower.num_layers, tower.stored_layers))
    return (prefix + rf"(?:{beyond})\..*",) if beyond else ()
