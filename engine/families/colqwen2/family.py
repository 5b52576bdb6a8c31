"""ColQwen2: Qwen2-VL or Qwen2.5-VL with a vector for each token, for the retrieval of pages.

A query is a text, a document is an image. The chat template, which is in place of the checkpoint's, gives
both the form in which the model was trained, as colpali-engine of its authors does. Transformers' processor
puts a line feed behind a query since version 5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import Family, Positions
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import ConfigReader
from engine.families.qwen2_5_vl.family import FAMILY as QWEN2_5_VL
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.families.retrieval import RetrievalFormat, vectors_template
from engine.layers.decoder_config import DecoderConfig
from engine.prompt import MediaSpan

_VLMS = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL}
#: Forms of a document and of a query where the processor's file states none.
_DOCUMENT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"
)
_QUERY = "Query: "


def _vlm(raw: Json) -> Family:
    """The family of the model inside.

    Raises:
        CheckpointError: it is another one.
    """
    kind = (raw.get("vlm_config") or {}).get("model_type", "qwen2_vl")
    if kind not in _VLMS:
        raise CheckpointError(
            f"config.json: vlm_config.model_type {kind!r} is not supported; {', '.join(_VLMS)} are",
            param="vlm_config",
        )
    return _VLMS[kind]


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    return _vlm(raw).reader.text(raw.get("vlm_config") or {})


def _vision(raw: Json, processor: Json, hidden: int) -> Any:
    read = _vlm(raw).reader.vision
    assert read is not None
    return read(raw.get("vlm_config") or {}, processor, hidden)


def _token(name: str) -> Any:
    def read(raw: Json, decoder: DecoderConfig) -> int | None:
        return getattr(_vlm(raw).reader, name)(raw.get("vlm_config") or {}, decoder)

    return read


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Adds the projection and the texts around queries and documents. There is no head."""
    raw, processor = checkpoint.config, checkpoint.json("processor_config.json")
    width = integer({"embedding_dim": 128, **raw}, "embedding_dim")
    return replace(
        config,
        decoder=replace(config.decoder, projected_width=width, tie_word_embeddings=True),
        extra={
            "vlm": _vlm(raw).name,
            "document": processor.get("visual_prompt_prefix") or _DOCUMENT,
            "query": processor.get("query_prefix") or _QUERY,
        },
    )


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    document, query = (json.dumps(config.extra[name]) for name in ("document", "query"))
    return PromptFormat(
        image="<|image_pad|>", template=vectors_template(document=document, query=f"{query} + text")
    )


def _positions(config: ModelConfig, ids: Sequence[int], spans: Sequence[MediaSpan]) -> Positions | None:
    """As in the model inside. Transformers' class gives images one-dimensional positions if it gets none."""
    return QWEN2_VL.positions(config, ids, spans)


def _weights(config: ModelConfig) -> WeightRules:
    assert config.extra is not None
    rules = _VLMS[config.extra["vlm"]].weights(config)
    return WeightRules(
        language=(
            (r"embedding_proj_layer\.(.*)", r"projection.\1"),
            (r"vlm\.(?:model\.)?(?:language_model\.)?((?:embed_tokens|layers|norm)\..*)", r"\1"),
        ),
        vision=tuple((r"vlm\." + pattern, name) for pattern, name in rules.vision),
        # Files of earlier releases hold the head, which nothing uses.
        ignore=(r"vlm\.lm_head\.weight", *rules.ignore),
    )


FAMILY = replace(
    QWEN2_VL,
    name="colqwen2",
    architectures=("ColQwen2ForRetrieval",),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=_token("image_token"),
        video_token=_token("video_token"),
        finish=_finished,
    ),
    prompt_format=_prompt_format,
    positions=_positions,
    options=("min_pixels", "max_pixels"),
    retrieval=lambda config: RetrievalFormat(per_token=True),
    weights=_weights,
)
