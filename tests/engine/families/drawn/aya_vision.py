"""Draws Aya Vision and Command A Vision checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.families.aya_vision import FRAME, IMAGES, ROW, SPECIALS, AyaVisionReference, aya_tokenizer
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
from tests.engine.families.drawn.vision import draw_pixels, draw_tower, hub_name

_TOKENS = 1024


@dataclass(frozen=True)
class AyaVisionFamily:
    """SigLIP, tiles by either rule, a gated connector, and Cohere 1 or 2.

    Args:
        kind: the beginning of the class names in Transformers.
    """

    kind: str

    @property
    def name(self) -> str:
        return {"AyaVision": "aya_vision", "Cohere2Vision": "cohere2_vision"}[self.kind]

    @property
    def architectures(self) -> tuple[str, ...]:
        return (f"{self.kind}ForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        (architecture,), aya = self.architectures, self.kind == "AyaVision"
        tok = aya_tokenizer()
        tok.save_pretrained(path)
        factor, patch = draw.choice("patches per row", (2, 2, 1, 3)), draw.choice("patch", (4, 6, 7))
        rows = draw.choice("rows per side", (1, 2, 3) if factor < 3 else (1, 2))
        side = patch * factor * rows + draw.variant("pixels without a patch", (0, 1, patch - 1), 0.2)
        tower = draw_tower(draw, side=side, patch=patch)
        tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        kind = draw.variant("text model", ("cohere2", "cohere"), 0.3)
        text = draw_decoder(draw, kind, len(tok), tokens=_TOKENS)
        text |= {"model_type": kind, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "downsample_factor": factor,
            "image_token_index" if aya else "image_token_id": ROW,
            "alignment_intermediate_size": draw.choice("connector's width", (16, 40, 96)),
        }
        if factor == 2:
            draw.spelled(raw, "downsample_factor")
        if aya:
            raw["vision_feature_layer"] = draw.variant("feature layer", (-1, -2, 1, [1]), 0.4)
            raw |= {"adapter_layer_norm_eps": draw.choice("connector's eps", (1e-6, 1e-3))}
            draw.spelled(raw, "adapter_layer_norm_eps", "alignment_intermediate_size")
        place_tied(draw, raw, text)
        rename = hub_name if draw.varies("hub names", 0.5) else None
        model = write_model(draw, path, raw, architecture, rename)
        draw_ends(draw, path, text, 2, 3)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        stated: dict[str, Any] = {
            "image_processor_type": f"{'GotOcr2' if aya else self.kind}ImageProcessor",
            "size": {"height": side, "width": side},
            "max_patches": draw.choice("most tiles", (12, 9, 4, 1)),
            **({} if aya else {"patch_size": rows}),
            **draw_pixels(draw),
        }
        if draw.varies("tiling stated", 0.3):
            # Aya Vision's whole processor asks for tiles all the same.
            stated["crop_to_patches"] = draw.choice("tiling", (True, False))
        write_json(path / "preprocessor_config.json", stated)
        kwargs: dict[str, Any] = {}
        if draw.varies("tiles by option", 0.2):
            kwargs["max_patches"] = draw.choice("tiles of the option", (1, 3, 5))
        return Drawn(
            path,
            same_weights(AyaVisionReference(path, self.kind, **kwargs), model),
            Style(
                FRAME,
                "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>",
                placeholder=lambda index, count: IMAGES[self.kind],
                area=4 * side**2,
                longest=20.0,
            ),
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset({ROW, *(SPECIALS.index(name) for name in SPECIALS[5:])}),
            lengths=nested_lengths_of(kind, text),
        )
