"""Draws checkpoints of MiniCPM-V 4.6 and 4.7, and of MiniCPM-OCR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.families import qwen
from tests.engine.families.drawn.checkpoint import (
    Drawn,
    Unavailable,
    draw_ends,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_tower
from tests.engine.families.minicpm_v4_6 import (
    IMAGE,
    OCR,
    PACKAGES,
    SPECIALS,
    STEMS,
    VIDEO,
    MiniCPMV46Reference,
    canvas_ids,
    make_tokenizer,
)
from tests.engine.tiny import TRANSFORMERS

_TOKENS = 768


@dataclass(frozen=True)
class MiniCPMV46Family:
    """Towers of both modes, before a Qwen3.5; ``version`` is a key of ``STEMS``."""

    version: int

    @property
    def name(self) -> str:
        return "minicpm_ocr" if self.version == OCR else f"minicpm_v4_{self.version}"

    @property
    def architectures(self) -> tuple[str, ...]:
        return (f"{STEMS[self.version]}ForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if TRANSFORMERS < (5, 23):
            raise Unavailable("these releases fail for images of several sizes, and slice them otherwise")
        tok = make_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, "qwen3_5", len(tok), tokens=_TOKENS, section=True)
        text |= {"model_type": "qwen3_5_text", "eos_token_id": 2, "pad_token_id": 0}
        patch, mode = draw.choice("patch", (2, 3, 4)), draw.variant("rows kept", ("16x", "4x"), 0.3)
        tower = draw_tower(draw, side=patch * draw.choice("table's side", (5, 7, 10)), patch=patch)
        raw: dict[str, Any] = {
            "model_type": PACKAGES[self.version],
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": {**tower, "model_type": f"{PACKAGES[self.version]}_vision"},
            "insert_layer_id": draw.integer("merged after", 0, tower["num_hidden_layers"] - 1),
            "downsample_mode": mode,
            "image_token_id": SPECIALS.index(IMAGE),
            "video_token_id": SPECIALS.index(VIDEO),
        }
        if self.version == 7:
            raw |= canvas_ids(tok)
        if "tie_word_embeddings" in text:
            raw["tie_word_embeddings"] = text.pop("tie_word_embeddings")
        model = write_model(draw, path, raw, self.architectures[0])
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [*self.architectures], **raw})
        image = {
            "image_processor_type": "MiniCPMV4_6ImageProcessor",
            "patch_size": patch,
            "downsample_mode": mode,
            "max_slice_nums": draw.choice("most slices", (1, 2, 4, 9)),
            "scale_resolution": 4 * patch * draw.choice("resolution in squares", (1, 2)),
            "use_image_id": draw.variant("images numbered", (True, False), 0.3),
            "slice_mode": draw.variant("slices", (True, False), 0.2),
            **draw_pixels(draw),
        }
        if self.version == OCR:
            image["image_processor_type"] = "MiniCPMOcrImageProcessor"
            image["small_image_upsize"] = draw.choice("small images", ("always", "never"))
        of_images = ("image_processor_type", "use_image_id", "small_image_upsize")
        video = {
            **{name: image[name] for name in image if name not in of_images},
            "video_processor_type": "MiniCPMV4_6VideoProcessor",
            "max_slice_nums": draw.choice("most slices of a frame", (1, 2, 4)),
            "scale_resolution": 4 * patch * draw.choice("resolution of frames in squares", (1, 2)),
            "slice_mode": draw.variant("slices of frames", (True, False), 0.2),
        }
        # Without a file for videos, they are prepared as images are.
        stated = draw.variant("a video processor", (True, False), 0.3)
        if draw.varies("processors in one file", 0.5):
            nested = {"image_processor": image, **({"video_processor": video} if stated else {})}
            write_json(path / "processor_config.json", nested)
        else:
            write_json(path / "preprocessor_config.json", image)
            if stated:
                write_json(path / "video_preprocessor_config.json", video)
        kwargs: dict[str, Any] = {}
        if draw.varies("slices by option", 0.3):
            kwargs["max_slice_nums"] = draw.choice("slices of the option", (1, 3, 6))
        style = Style(
            qwen.FRAME,
            "<|im_end|>\n",
            placeholder=lambda index, count: IMAGE,
            video=VIDEO,
            longest=20.0,
            frames=3,
            several=3,
        )
        reference = same_weights(MiniCPMV46Reference(path, self.version, **kwargs), model)
        media = frozenset({SPECIALS.index(IMAGE), SPECIALS.index(VIDEO)})
        options = {"mm_processor_kwargs": kwargs}
        return Drawn(path, reference, style, _TOKENS, options, media, lengths_of("qwen3_5", text))
