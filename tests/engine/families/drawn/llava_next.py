"""Draws LLaVA-NeXT checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.drawn.checkpoint import (
    Drawn,
    draw_ends,
    place_tied,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import nested_lengths_of
from tests.engine.families.drawn.vision import (
    draw_connector,
    draw_feature_layer,
    draw_pixels,
    draw_side,
    draw_tower,
    hub_name,
)
from tests.engine.families.llava_next import SPECIALS, LlavaNextReference, llava_next_tokenizer

_TOKENS = 1024
_KINDS = ("mistral", "llama", "qwen2", "qwen3", "phi3", "granite", "gemma")


class LlavaNextFamily:
    """LLaVA-NeXT: the whole image and its tiles, CLIP or SigLIP, and a decoder of many kinds."""

    name = "llava_next"
    architectures = ("LlavaNextForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = llava_next_tokenizer()
        tok.save_pretrained(path)
        kind = draw.variant("text model", _KINDS, 0.6)
        text = draw_decoder(draw, kind, len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}
        if kind != "llama" or draw.varies("text model stated", 0.5):
            text["model_type"] = kind
        side, patch = draw_side(draw)
        tower = draw_tower(draw, side=side, patch=patch)
        tower["model_type"] = draw.variant("tower", ("clip_vision_model", "siglip_vision_model"), 0.4)
        clip = tower["model_type"] == "clip_vision_model"
        if not clip:
            tower["vision_use_head"] = False
        pinpoints = draw_pinpoints(draw, side)
        image = SPECIALS.index("<image>")
        raw: dict[str, Any] = {
            "model_type": "llava_next",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            draw.choice("image token's name", ("image_token_index", "image_token_id")): image,
            "image_grid_pinpoints": pinpoints,
            "vision_feature_layer": draw_feature_layer(draw, tower["num_hidden_layers"], -2),
            "vision_feature_select_strategy": "default" if clip else "full",
        }
        if raw["vision_feature_layer"] == -2:
            draw.spelled(raw, "vision_feature_layer")
        if clip:
            draw.spelled(raw, "vision_feature_select_strategy")
        draw_connector(draw, raw)
        place_tied(draw, raw, text)
        (architecture,) = self.architectures
        renamed = hub_name if draw.varies("hub names", 0.5) else None
        model = write_model(draw, path, raw, architecture, renamed)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        write_tiles(draw, path, side, pinpoints)
        return Drawn(
            path,
            same_weights(LlavaNextReference(path), model),
            tiles_style(side),
            _TOKENS,
            media=frozenset({image}),
            lengths=nested_lengths_of(kind, text),
            # The family ends answers at it whatever the files state.
            ends=frozenset({2}),
        )


def draw_pinpoints(draw: Draw, side: int) -> list[list[int]]:
    """Tilings in pixels, in any order."""
    rng = draw.stream("pinpoints")
    every = [[a * side, b * side] for a in range(1, 4) for b in range(1, 4)]
    if draw.varies("few pinpoints", 0.5):
        return rng.sample(every, rng.randint(1, 6))
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]


def tiles_style(side: int) -> Style:
    """Prompts of a model whose tower takes squares of ``side`` pixels."""
    return Style(
        "USER: {} ASSISTANT:",
        "</s>",
        placeholder=lambda index, count: "<image>\n",
        area=4 * side * side,
        longest=40.0,
    )


def write_tiles(draw: Draw, path: Path, side: int, pinpoints: list[list[int]]) -> None:
    """preprocessor_config.json, whose squares are the tower's."""
    square = {"height": side, "width": side}
    stated: dict[str, Any] = {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": pinpoints,
        "size": draw.variant("size spelled", ({"shortest_edge": side}, side, square), 0.4),
        "crop_size": draw.variant("crop size spelled", (square, side), 0.3),
        **draw_pixels(draw),
    }
    if draw.varies("pad stated", 0.3):
        stated["do_pad"] = True
    how = draw.variant("crop", ("absent", "stated", "off"), 0.4)
    if how != "absent":
        stated["do_center_crop"] = how == "stated"
    write_json(path / "preprocessor_config.json", stated)
