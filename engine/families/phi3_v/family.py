"""Phi-3.5-vision, and VLM2Vec built on it: CLIP crops of one size, stitched, and a Phi-3 decoder.

The public config.json doesn't hold the tower's configuration: it is OpenAI's CLIP ViT-L/14 at 336 pixels. An
optional ``vision_config`` overrides it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, flat_text
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_clip, tower_rules, unused_tensors
from engine.families.phi3_v.config import HDVisionConfig
from engine.families.phi3_v.processor import Phi3VProcessor
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_VISION = r"model\.vision_embed_tokens\."
_TOWER = _VISION + r"img_processor\.(?:vision_model\.)?"
_IMAGE_TOKEN = 32044
#: ``<|endoftext|>`` and ``<|end|>`` end answers, but generation_config.json names neither.
_END_TOKENS = (32000, 32007)
#: The fields of ``embd_layer`` with the only values that are supported.
_LAYOUT = {
    "use_hd_transform": True,
    "with_learnable_separator": True,
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
}


def _vision(raw: Json, processor: Json, hidden: int) -> HDVisionConfig:
    stated = raw.get("embd_layer") or {}
    for field, expected in _LAYOUT.items():
        if stated.get(field, expected) != expected:
            raise CheckpointError(
                f"config.json: embd_layer.{field} {stated[field]!r} is not supported", param="embd_layer"
            )
    feature_layer = (raw.get("img_processor") or {}).get("layer_idx", -2)
    tower = parse_clip(raw.get("vision_config") or {}, feature_layer=feature_layer)
    config = HDVisionConfig(
        tower=tower.config,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
    )
    if config.side % 2:
        raise CheckpointError(
            f"config.json: {config.side} patches per side can't be joined two by two", param="vision_config"
        )
    return config


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (_VISION + r"((?:glb|sub)_GN)", r"\1"),
            (_VISION + r"img_projection\.0\.(.*)", r"connector.fc1.\1"),
            (_VISION + r"img_projection\.2\.(.*)", r"connector.fc2.\1"),
            *tower_rules(_TOWER),
        ),
        # Some files hold the decoder's embedding a second time, as wte.
        ignore=(_VISION + r"wte\.weight", *unused_tensors(_TOWER, config.vision.tower)),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.phi3_v.encoder import HDVisionEncoder

    return HDVisionEncoder(config.vision, build)


FAMILY = Family(
    name="phi3_v",
    architectures=("Phi3VForCausalLM",),
    reader=ConfigReader(
        text=flat_text("phi3"),
        vision=_vision,
        # Its embedding is never used, so any id of a small vocabulary serves as well.
        image_token=lambda raw, decoder: min(_IMAGE_TOKEN, decoder.vocab_size - 1),
        end_tokens=_END_TOKENS,
    ),
    prompt_format=lambda config: PromptFormat(image="<|image_{index}|>", separator="\n", split_at_media=True),
    processor=Phi3VProcessor.create,
    options=("num_crops",),
    weights=_weights,
    build_encoder=_encoder,
)
