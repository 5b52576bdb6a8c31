"""Draws LFM2-VL checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from tests.engine.families.lfm2_vl import FRAME, IMAGE, SPECIALS, Lfm2VlReference
from tests.engine.tiny import TRANSFORMERS, tokenizer

_ARCHITECTURE = "Lfm2VlForConditionalGeneration"
_MORE = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 8) for column in range(1, 8))
_TOKENS = 768


class Lfm2VlFamily:
    """Towers, projectors and processors of all sizes."""

    name = "lfm2_vl"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        specials = tuple(dict.fromkeys((*SPECIALS, *_MORE)))
        tok = tokenizer(
            specials, vocab_size=380, bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>"
        )
        tok.save_pretrained(path)
        text = draw_decoder(draw, "lfm2", len(tok), tokens=_TOKENS)
        text |= {"model_type": "lfm2", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        patch, factor = draw.choice("patch", (4, 6, 7)), draw.variant("downsampling", (2, 1, 3), 0.4)
        tower = draw_tower(draw, side=4 * patch, patch=patch)
        del tower["image_size"]
        tower |= {
            "model_type": "siglip2_vision_model",
            "num_patches": draw.choice("positions", (16, 25, 49)),
            "vision_use_head": draw.variant("pooling head", (False, True), 0.2),
        }
        raw: dict[str, Any] = {
            "model_type": "lfm2_vl",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "image_token_id": SPECIALS.index(IMAGE),
            "projector_hidden_size": draw.choice("projector width", (24, 40)),
            "projector_hidden_act": draw.variant("projector activation", ("gelu", "silu", "relu"), 0.3),
            "projector_bias": draw.variant("projector bias", (True, False), 0.3),
            "projector_use_layernorm": draw.variant("projector norm", (True, False), 0.4),
            "downsample_factor": factor,
        }
        for field in ("tie_embedding", "tie_word_embeddings"):
            if field in text:
                raw[field] = text.pop(field)
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        kwargs = self._processor(draw, path, patch, factor)
        style = Style(FRAME, "<|im_end|>\n", placeholder=lambda index, count: IMAGE, longest=5.0, several=3)
        reference = same_weights(Lfm2VlReference(path, **kwargs), model)
        media = frozenset({SPECIALS.index(IMAGE)})
        options = {"mm_processor_kwargs": kwargs}
        if factor == 1 and TRANSFORMERS < (5, 24):
            raise Unavailable("this release of Transformers resizes positions wrongly to one column")
        return Drawn(path, reference, style, _TOKENS, options, media, lengths_of("lfm2", text))

    @staticmethod
    def _processor(draw: Draw, path: Path, patch: int, factor: int) -> dict[str, Any]:
        """Write the processor's files; the options of the engine."""
        image = {
            "image_processor_type": "Lfm2VlImageProcessor",
            "do_convert_rgb": True,
            "encoder_patch_size": patch,
            "downsample_factor": factor,
            "tile_size": patch * factor * draw.choice("rows per side of a tile", (2, 3)),
            "min_tiles": draw.variant("least tiles", (2, 3), 0.2),
            "max_tiles": draw.choice("most tiles", (3, 4, 6)),
            "min_image_tokens": draw.choice("least rows", (1, 4)),
            "max_image_tokens": draw.choice("most rows", (9, 16)),
            "max_pixels_tolerance": draw.choice("tolerance", (1.0, 2.0, 1.5)),
            "use_thumbnail": draw.variant("thumbnail", (True, False), 0.3),
            "do_image_splitting": draw.variant("tiles", (True, False), 0.2),
            **draw_pixels(draw),
        }
        if draw.varies("processors in one file", 0.5):
            write_json(path / "processor_config.json", {"image_processor": image})
        else:
            write_json(path / "preprocessor_config.json", image)
        kwargs: dict[str, Any] = {}
        if draw.varies("tiles by option", 0.2):
            kwargs["do_image_splitting"] = draw.choice("tiles of the option", (True, False))
        return kwargs
