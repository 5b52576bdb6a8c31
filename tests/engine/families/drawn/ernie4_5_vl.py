"""Draws ERNIE 4.5 VL checkpoints."""

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
from tests.engine.families.drawn.vision import draw_pixels, draw_theta
from tests.engine.families.ernie4_5_vl import (
    FONT,
    FRAME,
    IMAGE,
    SPECIALS,
    TOKENS,
    VIDEO,
    ErnieReference,
    ernie_tokenizer,
    font,
)

_TOKENS = 640


class ErnieFamily:
    """A tower for images and videos of any size, and experts by modality."""

    name = "ernie4_5_vl"
    architectures = ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VL_MoeForConditionalGeneration")

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = ernie_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, "ernie4_5_vl_moe", len(tok), tokens=_TOKENS, section=True)
        text |= {"model_type": "ernie4_5_vl_moe_text", "eos_token_id": 2, "pad_token_id": 0}
        vision = _vision(draw)
        ids = {f"{name}_id": SPECIALS.index(token) for name, token in TOKENS.items()}
        raw: dict[str, Any] = {
            "model_type": "ernie4_5_vl_moe",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": vision | draw_theta(draw, 0.2),
            **ids,
        }
        place_tied(draw, raw, text)
        current, older = self.architectures
        model = write_model(draw, path, raw, current)
        draw_ends(draw, path, text, 2, 1)
        named = draw.variant("architecture", (current, older), 0.2)
        write_json(path / "config.json", {"architectures": [named], **raw})
        cell = vision["patch_size"] * vision.get("spatial_merge_size", 2)
        _write_processor(draw, path, vision, cell)
        (path / FONT).write_bytes(font())
        fps = draw.choice("fps", (1.0, 2.0, 0.3, 24.0))
        style = Style(
            FRAME,
            "</s>",
            placeholder=lambda index, count: IMAGE,
            video=VIDEO,
            area=60 * cell * cell,
            longest=draw.variant("longest images", (8.0, 100.0), 0.2),
            frames=20,
        )
        return Drawn(
            path,
            same_weights(ErnieReference(path, fps), model),
            style,
            _TOKENS,
            {"mm_processor_kwargs": {"fps": fps}},
            frozenset({ids["image_token_id"], ids["video_token_id"]}),
        )


def _vision(draw: Draw) -> dict[str, Any]:
    heads = draw.choice("tower heads", (1, 2, 3, 4))
    fields: dict[str, Any] = {
        "depth": draw.integer("tower layers", 1, 4),
        "num_heads": heads,
        # Its rotary embedding has two axes.
        "hidden_size": heads * draw.choice("tower head dim", (24, 32) if draw.coarse else (8, 16, 24)),
        "intermediate_size": draw.choice("tower intermediate", (24, 48, 52)),
        "patch_size": draw.choice("patch", (2, 4, 6)),
        "spatial_merge_size": draw.choice("merge", (2, 2, 2, 1, 3)),
    }
    if fields["spatial_merge_size"] == 2 and draw.varies("spatial_merge_size absent", 0.2):
        del fields["spatial_merge_size"]
    if draw.varies("temporal merge stated", 0.5):
        fields["temporal_merge_size"] = 2
    if draw.varies("channels stated", 0.4):
        fields["in_channels"] = 3
    if draw.varies("tower norm eps", 0.3):
        fields["rms_norm_eps"] = 1e-3
    if draw.varies("tower activation", 0.2):
        fields["hidden_act"] = draw.choice("tower's activation", ("gelu", "gelu_pytorch_tanh", "relu"))
    return fields


def _write_processor(draw: Draw, path: Path, vision: dict[str, Any], cell: int) -> None:
    """Options of both processors, in a file of their own or in one."""
    rng, area = draw.stream("pixel bounds"), cell**2
    sizes = {"patch_size": vision["patch_size"], "merge_size": vision.get("spatial_merge_size", 2)}
    pixels = draw_pixels(draw)
    size = {"shortest_edge": area * rng.choice((1, 4, 6)), "longest_edge": area * rng.choice((12, 30, 60))}
    images = {**sizes, **pixels, "size": size}
    if draw.varies("temporal patch stated", 0.5):
        images["temporal_patch_size"] = 1
    if draw.varies("bounds by Qwen's names", 0.2):
        # These classes don't read them.
        images |= {"min_pixels": area * 5, "max_pixels": area * 7}
    size = {"shortest_edge": area * rng.choice((1, 4)), "longest_edge": area * rng.choice((8, 40))}
    videos = {**sizes, **pixels, "size": size, "font": FONT, "draw_on_frames": True}
    if draw.varies("temporal patch of videos stated", 0.5):
        videos["temporal_patch_size"] = 2
    if draw.varies("one file", 0.4):
        stated = {"image_processor": images, "video_processor": videos}
        write_json(path / "processor_config.json", stated)
    else:
        write_json(path / "preprocessor_config.json", images)
        write_json(path / "video_preprocessor_config.json", videos)
