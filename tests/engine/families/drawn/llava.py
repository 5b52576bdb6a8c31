"""Draws LLaVA-1.5 and LLaVA-OneVision checkpoints."""

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
from tests.engine.families.drawn.rope import lengths_of, nested_lengths_of
from tests.engine.families.drawn.vision import (
    draw_connector,
    draw_feature_layer,
    draw_pixels,
    draw_side,
    draw_tower,
    hub_name,
)
from tests.engine.families.llava_variants import SPECIALS as LLAVA_SPECIALS
from tests.engine.families.llava_variants import LlavaVariantReference
from tests.engine.families.onevision import SPECIALS, OnevisionReference
from tests.engine.families.qwen import FRAME
from tests.engine.tiny import tokenizer

_TOKENS = 400
_TEXTS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma")
_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")


class LlavaFamily:
    """LLaVA: one crop per image, or Pixtral's whole images, and a decoder of many kinds."""

    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tok = tokenizer(LLAVA_SPECIALS, **roles)
        tok.save_pretrained(path)
        kind = draw.variant("text model", _TEXTS, 0.6)
        text = draw_decoder(draw, kind, len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}
        if kind != "llama" or draw.varies("text model stated", 0.5):
            text["model_type"] = kind
        side, patch = draw_side(draw)
        tower = self._tower(draw, side, patch)
        image_text = "[IMG]" if tower["model_type"] == "pixtral" else "<image>"
        image = LLAVA_SPECIALS.index(image_text)
        raw: dict[str, Any] = {
            "model_type": "llava",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            draw.choice("image token's name", ("image_token_index", "image_token_id")): image,
            "vision_feature_layer": draw_feature_layer(draw, tower["num_hidden_layers"], -2),
            "pad_token_id": 4,
        }
        draw_connector(draw, raw)
        place_tied(draw, raw, text)
        strategy = draw.variant("strategy", ("", "default", "full"), 0.6)
        if image_text == "[IMG]":
            strategy = "full"
        if strategy:
            raw["vision_feature_select_strategy"] = strategy
        (architecture,) = self.architectures
        # Pixtral's tower has one name.
        renamed = draw.varies("hub names", 0.5) and image_text == "<image>"
        model = write_model(draw, path, raw, architecture, hub_name if renamed else None)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        self._processor(draw, path, side, tower)
        style = Style(
            "USER: {} ASSISTANT:", "</s>", placeholder=lambda index, count: image_text + "\n", longest=40.0
        )
        lengths, media = nested_lengths_of(kind, text), frozenset({image})
        return Drawn(
            path,
            same_weights(LlavaVariantReference(path), model),
            style,
            _TOKENS,
            media=media,
            lengths=lengths,
        )

    def _tower(self, draw: Draw, side: int, patch: int) -> dict[str, Any]:
        kind = draw.variant("tower", _TOWERS, 0.4)
        tower = draw_tower(draw, side=side, patch=patch)
        if kind == "pixtral":
            # Its class has neither of the fields, and an axis of angles for each of two directions.
            del tower["layer_norm_eps" if "layer_norm_eps" in tower else "image_size"]
            tower |= {"hidden_act": tower.get("hidden_act", "silu"), "image_size": side * 2}
        if kind == "siglip_vision_model":
            tower["vision_use_head"] = False
        return {**tower, "model_type": kind}

    def _processor(self, draw: Draw, path: Path, side: int, tower: dict[str, Any]) -> None:
        """preprocessor_config.json, whose images fit the tower in one way or another."""
        square: dict[str, Any] = {"height": side, "width": side}
        found = {"do_convert_rgb": True} if draw.varies("convert stated", 0.3) else {}
        found |= draw_pixels(draw)
        kind = tower["model_type"]
        if kind == "pixtral":
            patch = tower["patch_size"]
            found |= {
                "image_processor_type": "PixtralImageProcessor",
                "size": {"longest_edge": tower["image_size"]},
                "patch_size": {"height": patch, "width": patch},
            }
        elif kind == "siglip_vision_model":
            found |= {"image_processor_type": "SiglipImageProcessor", "size": square}
        else:
            padded = draw.varies("padded to a square", 0.2)
            found["image_processor_type"] = "LlavaImageProcessor" if padded else "CLIPImageProcessor"
            edge = side + draw.variant("resized beyond the crop", (0, 1, 9), 0.2)
            found["size"] = edge if draw.varies("size an integer", 0.3) else {"shortest_edge": edge}
            found["crop_size"] = side if draw.varies("crop size an integer", 0.3) else square
            if padded:
                found["do_pad"] = True
            if draw.varies("crop stated", 0.3):
                found["do_center_crop"] = True
            elif draw.varies("no crop", 0.15):
                found |= {"do_center_crop": False, "size": square}
        write_json(path / "preprocessor_config.json", found)


class OnevisionFamily:
    """LLaVA-OneVision: one image in tiles, several in a crop each, videos, and Qwen2."""

    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(
            SPECIALS,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        )
        tok.save_pretrained(path)
        text = draw_decoder(draw, "qwen2", len(tok), tokens=1024)
        text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        if draw.varies("text model stated", 0.7):
            text["model_type"] = "qwen2"
        side, patch = draw_side(draw)
        tower = draw_tower(draw, side=side, patch=patch)
        tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        rng = draw.stream("pinpoints")
        most = rng.randint(2, 4)
        pinpoints = [[a * side, b * side] for a in range(1, most + 1) for b in range(1, most + 1)]
        if draw.varies("few pinpoints", 0.4):
            pinpoints = sorted(rng.sample(pinpoints, rng.randint(1, len(pinpoints))))
        image, video = SPECIALS.index("<image>"), SPECIALS.index("<video>")
        raw: dict[str, Any] = {
            "model_type": "llava_onevision",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "image_token_index": image,
            "video_token_index": video,
            "image_grid_pinpoints": pinpoints,
            "vision_feature_layer": draw_feature_layer(draw, tower["num_hidden_layers"], -1),
            "vision_aspect_ratio": f"anyres_max_{draw.choice('most tiles', (9, 1, 2, 4))}",
        }
        draw_connector(draw, raw)
        place_tied(draw, raw, text)
        (architecture,) = self.architectures
        model = write_model(
            draw, path, raw, architecture, hub_name if draw.varies("hub names", 0.5) else None
        )
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        stated = {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": side, "width": side},
            "image_grid_pinpoints": pinpoints,
            **draw_pixels(draw),
        }
        write_json(path / "preprocessor_config.json", stated)
        style = Style(
            FRAME,
            "<|im_end|>\n",
            placeholder=lambda index, count: "<image>",
            video="<video>",
            area=4 * side * side,
            longest=40.0,
            frames=32,
        )
        media = frozenset({image, video})
        lengths = lengths_of("qwen2", text)
        return Drawn(
            path, same_weights(OnevisionReference(path), model), style, 1024, media=media, lengths=lengths
        )
