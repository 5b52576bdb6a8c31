"""Draws Granite-Docling checkpoints."""

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
from tests.engine.families.granite_docling import (
    FRAME,
    HAS_GRANITE_DOCLING,
    SPECIALS,
    GraniteDoclingReference,
    granite_docling_tokenizer,
)


class GraniteDoclingFamily:
    """Tiles by a coarse or a fine connector, spreads, and features of several depths."""

    name = "granite_docling"
    architectures = ("GraniteDoclingForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if not HAS_GRANITE_DOCLING:
            raise Unavailable("this release of Transformers has no such family")
        tok = granite_docling_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, "granite", len(tok), tokens=1024)
        text["hidden_size"] += -text["hidden_size"] % 4
        text |= {
            "model_type": "granite_docling_text",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        square, patch = draw.choice("square", (2, 4)), draw.choice("patch", (4, 6))
        side = patch * square * draw.choice("rows per side", (1, 2))
        tower = draw_tower(draw, side=side, patch=patch)
        layers = tower["num_hidden_layers"]
        depths = list(range(layers))
        draw.stream("depths").shuffle(depths)
        most = min(layers, text["num_hidden_layers"], 3)
        fine = draw.varies("fine connector", 0.7)
        tower |= {
            "model_type": "granite_docling_vision",
            "scale_factor": square,
            "out_hidden_size": text["hidden_size"],
            "deepstack_visual_indexes": depths[: draw.integer("number of depths", 1, most)],
            "use_fine_route": fine,
        }
        image = SPECIALS.index("<image>")
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "image_token_id": image,
            "pad_token_id": 0,
        }
        tied = text.pop("tie_word_embeddings", None)
        if tied is not None:
            raw["tie_word_embeddings"] = tied
        if fine and draw.varies("router", 0.5):
            raw["density_router_hidden_size"] = 8
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        stated: dict[str, Any] = {
            "image_processor_type": "GraniteDoclingImageProcessor",
            "size": {"height": side, "width": side},
            "max_patches": draw.choice("most tiles", (1, 2, 4, 6)),
            **draw_pixels(draw),
        }
        if draw.varies("least tiles", 0.2):
            stated["min_patches"] = 2
        if draw.varies("spreads", 0.4):
            stated |= {
                "dense_max_patches": draw.choice("tiles of spreads", (1, 6)),
                "dense_max_scale": draw.choice("scale of spreads", (0.0, 0.8)),
                "dense_min_aspect": draw.choice("narrowest spread", (0.0, 1.2)),
                "dense_max_aspect": draw.choice("widest spread", (0.0, 3.0)),
            }
        kwargs: dict[str, Any] = {}
        if draw.varies("tiles by option", 0.2):
            kwargs["max_patches"] = draw.choice("tiles of the option", (1, 3))
        if draw.varies("whole pages by option", 0.1):
            kwargs["crop_to_patches"] = False
        if fine and draw.varies("fine rows by option", 0.5):
            kwargs["fine_route"] = True
        write_json(path / "preprocessor_config.json", stated)
        style = Style(
            FRAME,
            "<|end_of_text|>\n",
            placeholder=lambda index, count: "<image>",
            longest=5.0,
            several=3,
        )
        reference = same_weights(GraniteDoclingReference(path, **kwargs), model)
        lengths = lengths_of("granite", text)
        media = frozenset({image})
        return Drawn(path, reference, style, 1024, {"mm_processor_kwargs": kwargs}, media, lengths)
