"""Embedding rows in place of images, in the forms that an engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.families.base import PromptAwareProcessor
from engine.media.decode import upright_rgb
from engine.model_parts import load_media_processor
from tests.engine.families.case import CasePrompt


def as_embeddings(config: EngineConfig, prompts: Sequence[CasePrompt]) -> list[list[Any]]:
    """Per prompt the forms of ``multi_modal_data["image"]``: item by item, and all rows in one tensor."""
    encoder, processor = EncoderEngine.load(config), load_media_processor(config)
    assert processor is not None
    found = []
    for prompt in prompts:
        ours: Any = processor
        if isinstance(processor, PromptAwareProcessor):
            ours = processor.among(len(prompt.pictures))
        media = [ours.prepare(upright_rgb(image)) for image in prompt.pictures]
        rows = encoder.encode(media)
        field = ours.embedding_field
        ways = [rows, torch.stack(rows) if field is None else torch.cat(rows)]
        described: dict[str, Any] = {
            None: {},
            "image_grid_thw": {"image_grid_thw": torch.tensor([entry.item.grid for entry in media])},
            "image_size_list": {"image_size_list": [image.size for image in prompt.pictures]},
        }[field and field.name]
        found.append([{"image_embeds": embeds, **described} for embeds in ways])
    return found
