"""Draws Mistral3 and LightOnOCR checkpoints: Pixtral towers whose squares of patches become rows."""

from __future__ import annotations

from dataclasses import dataclass
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
from tests.engine.families.drawn.vision import draw_connector, draw_pixels, draw_pixtral
from tests.engine.families.pixtral_squares import LIGHTON_SPECIALS, MISTRAL_SPECIALS, SquaresReference
from tests.engine.families.qwen import FRAME
from tests.engine.tiny import tokenizer

_TOKENS = 512


@dataclass(frozen=True)
class SquaresFamily:
    """One of the two; ``kind`` is the beginning of its class names in Transformers."""

    kind: str

    @property
    def name(self) -> str:
        return "mistral3" if self._mistral else "lighton_ocr"

    @property
    def architectures(self) -> tuple[str, ...]:
        return (f"{self.kind}ForConditionalGeneration",)

    @property
    def _mistral(self) -> bool:
        return self.kind == "Mistral3"

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = _mistral_tokenizer() if self._mistral else _lighton_tokenizer()
        tok.save_pretrained(path)
        kinds = ("mistral", "ministral3") if self._mistral else ("qwen3", "qwen2")
        kind = draw.variant("text model", kinds, 0.4)
        text = draw_decoder(draw, kind, len(tok), tokens=_TOKENS)
        text |= {"eos_token_id": 2, "pad_token_id": 3 if self._mistral else 0, "model_type": kind}
        text["bos_token_id"] = 1 if self._mistral else 0
        patch = draw.choice("patch", (4, 6, 8))
        merge = draw.choice("merge", (2, 2, 2, 1, 3, 4))
        tower = draw_pixtral(
            draw, longest=patch * merge * draw.choice("most rows per side", (4, 7)), patch=patch
        )
        image = tok.convert_tokens_to_ids("[IMG]" if self._mistral else "<|image_pad|>")
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "image_token_id": image,
            "spatial_merge_size": merge,
        }
        if merge == 2:
            draw.spelled(raw, "spatial_merge_size")
        if self._mistral:
            raw[draw.choice("image token's name", ("image_token_index", "image_token_id"))] = image
            _mistral_vision(draw, raw)
        place_tied(draw, raw, text)
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        self._processor(draw, path, tower, merge)
        placeholder = "[IMG]" if self._mistral else "<|image_pad|>"
        style = Style(
            "<s>[INST]{}[/INST]" if self._mistral else FRAME,
            "</s>" if self._mistral else "<|im_end|>\n",
            placeholder=lambda index, count: placeholder,
            area=tower["image_size"] ** 2,
            longest=20.0,
        )
        return Drawn(
            path,
            same_weights(SquaresReference(path, self.kind), model),
            style,
            _TOKENS,
            media=frozenset({image}),
            lengths=nested_lengths_of(kind, text),
            # Mistral3 ends answers at it whatever the files state.
            ends=frozenset({2} if self._mistral else ()),
        )

    def _processor(self, draw: Draw, path: Path, tower: dict[str, Any], merge: int) -> None:
        """preprocessor_config.json, and perhaps processor_config.json."""
        longest, unit = tower["image_size"], tower["patch_size"]
        # Mistral's processor asks for whole rows; the other one's image processor has a patch of its own.
        patch = unit * (merge if self._mistral else draw.variant("own patch", (merge, 1), 0.3))
        square = {"height": patch, "width": patch}
        bounds = {"height": longest, "width": draw.choice("widest", (longest, longest // 2))}
        stated: dict[str, Any] = {
            "image_processor_type": "PixtralImageProcessor",
            "size": draw.variant("size spelled", ({"longest_edge": longest}, bounds), 0.3),
            "patch_size": draw.variant("patch size spelled", (square, patch), 0.3),
            **draw_pixels(draw),
        }
        own = {"processor_class": "PixtralProcessor", "patch_size": unit, "spatial_merge_size": merge}
        how = draw.variant("processor config", ("absent", "beside", "around"), 0.6)
        if how == "around":
            write_json(path / "processor_config.json", {**own, "image_processor": stated})
            return
        if how == "beside":
            write_json(path / "processor_config.json", own)
        write_json(path / "preprocessor_config.json", stated)


def _mistral_vision(draw: Draw, raw: dict[str, Any]) -> None:
    """Fields of config.json that LightOnOCR does not have."""
    if draw.varies("feature layer", 0.4):
        layers = raw["vision_config"]["num_hidden_layers"]
        options = [*range(1, layers + 1), *range(-layers, 0)]
        raw["vision_feature_layer"] = draw.choice("feature layer's index", options)
    draw_connector(draw, raw)


def _mistral_tokenizer() -> Any:
    return tokenizer(
        MISTRAL_SPECIALS, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _lighton_tokenizer() -> Any:
    roles = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    return tokenizer(
        LIGHTON_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=roles
    )
