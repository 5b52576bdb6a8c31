"""ColPali: PaliGemma with a vector for each token, for the retrieval of pages.

A query is a text, a document is an image. All tokens of a prompt attend to each other, as in the prefix of
PaliGemma. The chat template, which is in place of the checkpoint's, gives both the form in which the model
was trained.
"""

from __future__ import annotations

import json
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.paligemma.family import (
    paligemma_decoder,
    paligemma_image_token,
    paligemma_processor,
    paligemma_text,
    paligemma_vision,
)
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import ConfigReader
from engine.families.parsing.tower import tower_rules, unused_tensors
from engine.families.retrieval import RetrievalFormat, vectors_template
from engine.layers.decoder_config import DecoderConfig
from engine.vision.crops_config import CropVisionConfig

_TOWER = r"vlm\.(?:model\.)?vision_tower\.(?:vision_model\.)?"
_IMAGE = "<image>"
#: Words of a document and before a query where the processor's file states none.
_DOCUMENT = "Describe the image."
_QUERY = "Question: "


def _vlm(raw: Json) -> Json:
    """The configuration of the model inside.

    Raises:
        CheckpointError: it is no PaliGemma.
    """
    vlm = raw.get("vlm_config") or {}
    kind = vlm.get("model_type", "paligemma")
    if kind != "paligemma":
        raise CheckpointError(
            f"config.json: vlm_config.model_type {kind!r} is not supported; paligemma is", param="vlm_config"
        )
    return vlm


def _image_token(raw: Json, decoder: DecoderConfig) -> int | None:
    return paligemma_image_token(_vlm(raw), decoder)


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    return paligemma_vision(_vlm(raw), processor, hidden)


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Adds the projection and the texts around queries and documents. There is no head."""
    width = integer({"embedding_dim": 128, **checkpoint.config}, "embedding_dim")
    stated = checkpoint.json("processor_config.json")
    decoder = replace(paligemma_decoder(config.decoder), projected_width=width, tie_word_embeddings=True)
    return replace(
        config,
        decoder=decoder,
        extra={
            "document": stated.get("visual_prompt_prefix") or _DOCUMENT,
            "query": stated.get("query_prefix") or _QUERY,
        },
    )


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    image, document, query = (json.dumps(text) for text in (_IMAGE, *config.extra.values()))
    return PromptFormat(
        image=_IMAGE,
        adds_special=False,
        template=vectors_template(
            document=f"{image} + bos_token + {document} + '\\n'",
            query=f"bos_token + {query} + text",
            end="'\\n'",
        ),
    )


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        language=(
            (r"embedding_proj_layer\.(.*)", r"projection.\1"),
            (
                r"vlm\.(?:model\.)?(?:language_model\.)?(?:model\.)?((?:embed_tokens|layers|norm)\..*)",
                r"\1",
            ),
        ),
        vision=(
            (r"vlm\.(?:model\.)?multi_modal_projector\.linear\.(.*)", r"connector.\1"),
            *tower_rules(_TOWER),
        ),
        # Files of earlier releases hold the head, which nothing uses.
        ignore=(r"vlm\.(?:language_model\.)?lm_head\.weight", *unused_tensors(_TOWER, config.vision.tower)),
    )


FAMILY = Family(
    name="colpali",
    architectures=("ColPaliForRetrieval",),
    reader=ConfigReader(
        text=lambda raw: paligemma_text(_vlm(raw), "gemma"),
        vision=_vision,
        image_token=_image_token,
        finish=_finished,
    ),
    prompt_format=_prompt_format,
    processor=paligemma_processor,
    retrieval=lambda config: RetrievalFormat(per_token=True),
    weights=_weights,
    build_encoder=crop_encoder,
)
