"""Draws GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.families import glm
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
from tests.engine.families.drawn.rope import lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_theta
from tests.engine.tiny import tokenizer

_MODEL_TYPES = {"Glm4v": "glm4v", "Glm46V": "glm46v", "Glm4vMoe": "glm4v_moe", "GlmOcr": "glm_ocr"}


@dataclass(frozen=True)
class GlmFamily:
    """One architecture; ``kind`` is the beginning of its class names in Transformers."""

    kind: str

    @property
    def name(self) -> str:
        return _MODEL_TYPES[self.kind]

    @property
    def architectures(self) -> tuple[str, ...]:
        return (f"{self.kind}ForConditionalGeneration",)

    @property
    def _part(self) -> str:
        """The beginning of the model types of its parts."""
        return "glm4v" if self.kind == "Glm46V" else self.name

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(glm.SPECIALS, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
        tok.save_pretrained(path)
        # Times of videos are text.
        long = draw.varies("long videos", 0.2)
        tokens = 4096 if long else 512
        text = draw_decoder(draw, self._part, len(tok), tokens=tokens, section=True)
        text |= {"model_type": f"{self._part}_text", "pad_token_id": 0, "eos_token_id": [0, 1]}
        vision = self._vision(draw, text["hidden_size"])
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": vision | draw_theta(draw, 0.2),
            **{
                f"{name}_token_id": glm.SPECIALS.index(f"<|{mark}|>")
                for name, mark in (
                    ("image", "image"),
                    ("video", "video"),
                    ("image_start", "begin_of_image"),
                    ("image_end", "end_of_image"),
                    ("video_start", "begin_of_video"),
                    ("video_end", "end_of_video"),
                )
            },
        }
        place_tied(draw, raw, text)
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        draw_ends(draw, path, text, 0, 1)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        cell = vision["patch_size"] * vision.get("spatial_merge_size", 2)
        processor = draw.variant("processor", (glm.PROCESSORS[self.kind], "Glm4v", "Glm46V"), 0.4)
        _write_processor(draw, path, processor, vision, cell)
        fps = draw.choice("fps", (1.0, 2.0, 0.5, 24.0))
        kwargs: dict[str, Any] = {"fps": fps}
        bounds = None
        if draw.varies("bounds by option", 0.2):
            bounds = (
                2 * cell**2 * draw.choice("least cells", (1, 5)),
                2 * cell**2 * draw.choice("most cells", (9, 40)),
            )
            kwargs |= {"min_pixels": bounds[0], "max_pixels": bounds[1]}
        style = Style(
            glm.FRAME,
            "\n",
            placeholder=lambda index, count: glm.IMAGE,
            video=glm.VIDEO,
            area=60 * cell * cell,
            longest=draw.variant("longest images", (8.0, 100.0), 0.2),
            frames=300 if long else 24,
        )
        return Drawn(
            path,
            same_weights(glm.GlmReference(path, self.kind, fps, bounds, processor), model),
            style,
            tokens,
            {"mm_processor_kwargs": kwargs},
            frozenset({raw["image_token_id"], raw["video_token_id"]}),
            lengths_of(self._part, text),
        )

    def _vision(self, draw: Draw, hidden: int) -> dict[str, Any]:
        heads = draw.choice("tower heads", (1, 2, 3, 4))
        patch = draw.choice("patch", (2, 4, 6))
        fields: dict[str, Any] = {
            "model_type": f"{self._part}_vision",
            "depth": draw.integer("tower layers", 1, 4),
            "num_heads": heads,
            # Its rotary embedding has two axes.
            "hidden_size": heads * draw.choice("tower head dim", (24, 32) if draw.coarse else (8, 16, 24)),
            "image_size": patch * draw.integer("position table's side", 2, 7),
            "patch_size": patch,
            "spatial_merge_size": draw.choice("merge", (2, 2, 2, 1, 3)),
            "temporal_patch_size": draw.choice("temporal patch", (2, 2, 2, 1, 3)),
            "out_hidden_size": hidden,
            "intermediate_size": draw.choice("tower intermediate", (24, 48, 52)),
        }
        for field, default in (("spatial_merge_size", 2), ("temporal_patch_size", 2)):
            if fields[field] == default and draw.varies(f"{field} absent", 0.1):
                del fields[field]
        if draw.varies("channels stated", 0.4):
            fields["in_channels"] = 3
        if draw.varies("tower bias stated", 0.4):
            fields["attention_bias"] = draw.choice("tower bias", (True, False))
        if draw.varies("tower norm eps", 0.3):
            fields["rms_norm_eps"] = 1e-3
        if draw.varies("tower activation", 0.2):
            fields["hidden_act"] = draw.choice("tower's activation", ("gelu", "gelu_pytorch_tanh", "relu"))
        return fields


def _write_processor(draw: Draw, path: Path, kind: str, vision: dict[str, Any], cell: int) -> None:
    """preprocessor_config.json, whose bounds are those of a temporal patch, and perhaps one for videos.

    Args:
        kind: the beginning of the processors' class names.
    """
    rng = draw.stream("pixel bounds")
    temporal = vision.get("temporal_patch_size", 2)
    sizes = {
        "patch_size": vision["patch_size"],
        "merge_size": vision.get("spatial_merge_size", 2),
        "temporal_patch_size": temporal,
    }
    area = temporal * cell**2
    size = {"shortest_edge": area * rng.choice((1, 4, 6)), "longest_edge": area * rng.choice((12, 30, 60))}
    pixels = draw_pixels(draw)
    named = {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor"}
    stated = {**named, **sizes, **pixels, "size": size}
    if draw.varies("bounds by Qwen's names", 0.2):
        # These classes don't read them.
        stated |= {"min_pixels": area * 5, "max_pixels": area * 7}
    write_json(path / "preprocessor_config.json", stated)
    if draw.varies("videos' own bounds", 0.4):
        size = {"shortest_edge": area * rng.choice((1, 4)), "longest_edge": area * rng.choice((8, 40))}
        write_json(path / "video_preprocessor_config.json", {**sizes, **pixels, "size": size})
