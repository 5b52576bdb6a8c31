"""Draws InternVL, with Transformers' names and with the publishers' own, and Qianfan-OCR."""

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
from tests.engine.families.drawn.vision import draw_pixels, draw_sizes
from tests.engine.families.internvl import SPECIALS, TOKENS, InternVLReference
from tests.engine.families.internvl_chat import COPY, InternVLChatReference, publish
from tests.engine.families.qwen import FRAME
from tests.engine.tiny import split_shards, tokenizer

_TOKENS = 1024
_ARCHITECTURE = "InternVLForConditionalGeneration"
_MODEL_TYPES = {"InternVL": "internvl", "QianfanOCR": "qianfan_ocr"}
_ROW = SPECIALS.index("<IMG_CONTEXT>")
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class InternVLFamily:
    """InternVL in Transformers' layout, or Qianfan-OCR in its own.

    Args:
        kind: the beginning of the class names in Transformers.
    """

    kind: str = "InternVL"

    @property
    def name(self) -> str:
        return _MODEL_TYPES[self.kind]

    @property
    def architectures(self) -> tuple[str, ...]:
        return (f"{self.kind}ForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        (architecture,) = self.architectures
        model, raw = _write(draw, path, ("qwen2", "qwen3", "llama", "qwen3_moe"), architecture=architecture)
        text = raw["text_config"]
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        side, pixels = raw["vision_config"]["image_size"], draw_pixels(draw)
        side = side[0] if isinstance(side, list) else side
        square = {"height": side, "width": side}
        stated: dict[str, Any] = {"image_processor_type": "GotOcr2ImageProcessor", "size": square, **pixels}
        bounds = _bounds(draw)
        if draw.varies("tiles stated", 0.7):
            stated |= {"min_patches": bounds[0], "max_patches": bounds[1]}
        if draw.varies("tiling stated", 0.3):
            # The whole processor asks for tiles all the same.
            stated["crop_to_patches"] = draw.choice("tiling", (True, False))
        write_json(path / "preprocessor_config.json", stated)
        if draw.varies("videos' own file", 0.4):
            write_json(path / "video_preprocessor_config.json", {"size": square, **pixels})
        kwargs = _options(draw)
        reference = same_weights(InternVLReference(path, self.kind, **kwargs), model)
        options = {"mm_processor_kwargs": kwargs}
        media = frozenset({_ROW, SPECIALS.index("<video>")})
        lengths = nested_lengths_of(text.get("model_type", "qwen2"), text)
        placeholder, video = (
            ("<IMG_CONTEXT>\n", "<video>") if self.kind == "InternVL" else ("<image>\n", None)
        )
        style = _style(placeholder, side, video)
        return Drawn(path, reference, style, _TOKENS, options, media, lengths)


class InternVLChatFamily:
    """InternVL in its publishers' layout."""

    name = "internvl_chat"
    architectures = ("InternVLChatModel",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        copy = path / COPY
        copy.mkdir()
        model, raw = _write(draw, copy, ("qwen2", "qwen3", "llama", "phi3", "qwen3_moe"), chat=True)
        side, text, bounds = raw["vision_config"]["image_size"], raw["text_config"], _bounds(draw)
        colours = dict(_IMAGENET)
        if stated := draw.varies("mean and std", 0.5):
            colours = {"image_mean": [0.5, 0.45, 0.4], "image_std": [0.3, 0.25, 0.28]}
        theirs = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": side, "width": side}}
        write_json(
            copy / "preprocessor_config.json",
            {**theirs, **colours, "min_patches": bounds[0], "max_patches": bounds[1]},
        )
        fields: dict[str, Any] = {"min_dynamic_patch": bounds[0], "max_dynamic_patch": bounds[1]}
        for name in ("force_image_size", "use_thumbnail", "ps_version", "dynamic_image_size"):
            if draw.varies(f"{name} absent", 0.2):
                fields[name] = None
        draw_ends(draw, copy, text, 2, 0)
        write_json(copy / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        publish(path, {"size": side, "crop_size": side, **(colours if stated else {})}, **fields)
        if draw.varies("more shards", 0.3):
            split_shards(path)
        kwargs = _options(draw)
        reference = same_weights(InternVLChatReference(path, **kwargs), model)
        options = {"mm_processor_kwargs": kwargs}
        lengths = nested_lengths_of(text.get("model_type", "qwen2"), text)
        media = frozenset({_ROW})
        # The publishers' code ends answers at it.
        return Drawn(
            path, reference, _style("<image>\n", side), _TOKENS, options, media, lengths, frozenset({2})
        )


def _write(
    draw: Draw, path: Path, kinds: tuple[str, ...], *, chat: bool = False, architecture: str = _ARCHITECTURE
) -> tuple[Any, dict[str, Any]]:
    """A checkpoint in Transformers' layout; its model and its config.json."""
    qianfan = architecture != _ARCHITECTURE
    tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=TOKENS)
    tok.save_pretrained(path)
    kind = draw.variant("text model", kinds, 0.5)
    text = draw_decoder(draw, kind, len(tok), tokens=_TOKENS)
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    if kind != ("qwen3" if qianfan else "qwen2") or draw.varies("text model stated", 0.7):
        text["model_type"] = kind
    tower, ratio = _tower(draw, chat, bias=qianfan)
    raw: dict[str, Any] = {
        "model_type": "qianfan_ocr" if qianfan else "internvl",
        "torch_dtype": "float32",
        "text_config": text,
        "vision_config": tower,
        "image_token_id": _ROW,
        "downsample_ratio": ratio,
    }
    if ratio == 0.5:
        draw.spelled(raw, "downsample_ratio")
    layers = tower["num_hidden_layers"]
    if draw.varies("feature layer", 0.4):
        options = [*range(1, layers + 1), *range(-layers, 0)]
        raw["vision_feature_layer"] = draw.choice("feature layer's index", options)
    if not chat and draw.varies("connector activation", 0.3):
        names = ("gelu_pytorch_tanh", "relu", "quick_gelu", "silu")
        raw["projector_hidden_act"] = draw.choice("connector's activation", names)
    if chat:
        # The publishers' files have it among the decoder's fields alone.
        raw["tie_word_embeddings"] = text.setdefault("tie_word_embeddings", False)
    else:
        place_tied(draw, raw, text)
    return write_model(draw, path, raw, architecture), raw


def _tower(draw: Draw, chat: bool, bias: bool) -> tuple[dict[str, Any], float]:
    """``vision_config``, and a ``downsample_ratio`` that divides its patches.

    Args:
        bias: ``attention_bias`` where it is left out.
    """
    patch, factor = draw.choice("patch", (4, 6, 7)), draw.choice("squares' side", (2, 2, 1, 4))
    per_side = factor * draw.choice("rows per side", (1, 2, 3) if factor < 4 else (1, 2))
    side = patch * per_side + draw.variant("pixels without a patch", (0, 1, patch - 1), 0.2)
    tower = draw_sizes(draw, side=side, patch=patch) | {
        "attention_bias": draw.choice("tower bias", (True, False)),
        "use_qk_norm": draw.variant("norm of queries and keys", (False, True), 0.3),
        "norm_type": draw.variant("tower norm", ("layer_norm", "rms_norm"), 0.3),
        "layer_norm_eps": draw.variant("tower norm eps", (1e-6, 1e-3), 0.3),
        "hidden_act": draw.variant("tower activation", ("gelu", "gelu_pytorch_tanh", "relu"), 0.3),
    }
    if not chat:
        for field in ("image_size", "patch_size"):
            if draw.varies(f"{field} a list", 0.6):
                tower[field] = [tower[field]] * 2
        if draw.varies("no table of positions", 0.1):
            tower["use_absolute_position_embeddings"] = False
        if tower["norm_type"] == "layer_norm" and draw.varies("norm of the output", 0.2):
            tower["use_mean_pooling"] = False
    for field, plain in (_TOWER_DEFAULTS | {"attention_bias": bias}).items():
        if tower[field] == plain:
            draw.spelled(tower, field)
    return tower, 1 / factor


_TOWER_DEFAULTS = {
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}


def _bounds(draw: Draw) -> tuple[int, int]:
    """The fewest and the most tiles of an image."""
    low = draw.variant("least tiles", (1, 2, 3), 0.2)
    return low, max(low, draw.choice("most tiles", (12, 6, 4, 1)))


def _options(draw: Draw) -> dict[str, Any]:
    """``mm_processor_kwargs``."""
    kwargs: dict[str, Any] = {}
    if draw.varies("tiles by option", 0.2):
        kwargs["max_patches"] = draw.choice("tiles of the option", (1, 3, 5))
    if draw.varies("tiling by option", 0.15):
        kwargs["crop_to_patches"] = draw.choice("tiling of the option", (True, False))
    return kwargs


def _style(placeholder: str, side: int, video: str | None = "<video>") -> Style:
    return Style(
        FRAME,
        "<|im_end|>\n",
        placeholder=lambda index, count: placeholder,
        video=video,
        area=4 * side * side,
        longest=20.0,
        frames=24,
    )
