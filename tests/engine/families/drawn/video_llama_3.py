"""Draws VideoLLaMA 3 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families import qwen
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
from tests.engine.families.drawn.vision import draw_pixels, draw_theta, draw_tower
from tests.engine.families.video_llama_3 import IMAGE, VideoLlama3Reference
from tests.engine.tiny import QWEN_SPECIALS, tokenizer

_TOKENS = 512
_ARCHITECTURE = "VideoLlama3ForConditionalGeneration"


class VideoLlama3Family:
    """Towers without a table of positions, before a Qwen2."""

    name = "video_llama_3"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tok.save_pretrained(path)
        text = draw_decoder(draw, "qwen2", len(tok), tokens=_TOKENS)
        text |= {"model_type": "qwen2", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        patch = draw.choice("patch", (4, 6, 7))
        tower = draw_tower(draw, side=patch, patch=patch)
        del tower["image_size"]
        # Half of a head rotates by rows, half by columns.
        tower["hidden_size"] = tower["num_attention_heads"] * draw.choice("tower head dim", (8, 16, 24))
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": {**tower, "model_type": "video_llama_3_vision", **draw_theta(draw, 0.2)},
            "image_token_id": QWEN_SPECIALS.index(IMAGE),
            "video_token_id": QWEN_SPECIALS.index("<|video_pad|>"),
        }
        place_tied(draw, raw, text)
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        rng = draw.stream("pixel bounds")
        size = {
            "shortest_edge": patch**2 * rng.choice((1, 9)),
            "longest_edge": patch**2 * rng.choice((20, 60)),
        }
        images = {"patch_size": patch, "size": size, **draw_pixels(draw)}
        if draw.varies("processors in one file", 0.5):
            write_json(path / "processor_config.json", {"image_processor": images})
        else:
            write_json(path / "preprocessor_config.json", images)
            if draw.varies("a file for videos", 0.5):
                write_json(path / "video_preprocessor_config.json", {**images, "merge_size": 2})
        style = Style(
            qwen.FRAME,
            "<|im_end|>\n",
            placeholder=lambda index, count: IMAGE,
            area=60 * patch**2,
            longest=draw.variant("longest images", (8.0, 100.0), 0.2),
        )
        return Drawn(
            path,
            same_weights(VideoLlama3Reference(path), model),
            style,
            _TOKENS,
            media=frozenset({raw["image_token_id"]}),
            lengths=nested_lengths_of("qwen2", text),
        )
