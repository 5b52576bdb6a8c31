"""Draws Muse Glimmer checkpoints."""

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
from tests.engine.families.drawn.vision import draw_theta
from tests.engine.families.muse_glimmer import (
    FRAME,
    HAS_MUSE_GLIMMER,
    IMAGE,
    SPECIALS,
    VIDEO,
    MuseGlimmerReference,
    muse_tokenizer,
)

_TOKENS = 768
_ARCHITECTURE = "MuseGlimmerForConditionalGeneration"


class MuseGlimmerFamily:
    """A tower of any windows and patches, and a decoder of any layers with and without windows and angles."""

    name = "muse_glimmer"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if not HAS_MUSE_GLIMMER:
            raise Unavailable("this release of Transformers has no Muse Glimmer")
        tok = muse_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, "muse_glimmer", len(tok), tokens=_TOKENS)
        text |= {"model_type": "muse_glimmer_text", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        vision = self._vision(draw)
        merge = vision.get("merge_size", 2)
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": vision,
            "image_token_id": SPECIALS.index(IMAGE),
            "video_token_id": SPECIALS.index(VIDEO),
            "out_hidden_size": vision["hidden_size"] * merge**2,
            "projector_hidden_size": draw.choice("projector", (24, 40)),
        }
        tied = text.pop("tie_word_embeddings", None)
        for name, target in (("within", text), ("outside", raw)):
            if tied is not None and draw.varies(f"tied stated {name}", 0.7):
                target["tie_word_embeddings"] = tied
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 1)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        cell = vision["patch_size"] * merge
        sides = {"patch_size": vision["patch_size"], "merge_size": merge}
        sides["temporal_patch_size"] = vision.get("patch_temporal", 2)
        images: dict[str, Any] = {**sides, "max_image_tokens": draw.choice("most rows", (1, 12, 40))}
        videos: dict[str, Any] = {
            **sides,
            "max_video_frame_tokens": draw.choice("most rows of a frame", (1, 9)),
        }
        if draw.varies("filter", 0.3):
            images["resample"] = videos["resample"] = draw.choice("resample", (2, 3))
        if draw.varies("colours", 0.3):
            colours = {"image_mean": [0.4, 0.5, 0.3], "image_std": [0.3, 0.25, 0.5]}
            images, videos = {**images, **colours}, {**videos, **colours}
        if draw.varies("form of times", 0.3):
            videos["frame_timestamp_format"] = "[{timestamp:.2f}]"
        write_json(path / "preprocessor_config.json", images)
        write_json(path / "video_preprocessor_config.json", videos)
        fps = draw.choice("fps", (1.5, 24.0, 2.0, 0.3))
        style = Style(
            FRAME,
            "<|eot|>",
            placeholder=lambda index, count: IMAGE,
            video=VIDEO,
            area=60 * cell * cell,
            longest=draw.variant("longest images", (8.0, 100.0), 0.2),
        )
        return Drawn(
            path,
            same_weights(MuseGlimmerReference(path, fps), model),
            style,
            _TOKENS,
            {"mm_processor_kwargs": {"fps": fps}},
            frozenset({raw["image_token_id"], raw["video_token_id"]}),
            lengths_of(self.name, text),
        )

    def _vision(self, draw: Draw) -> dict[str, Any]:
        heads, depth = draw.choice("tower heads", (1, 2, 3)), draw.integer("tower layers", 1, 4)
        merge = draw.choice("merge", (2, 2, 2, 1, 3))
        side = merge * draw.integer("window", 1, 3)
        rng = draw.stream("tower lists")
        fields: dict[str, Any] = {
            "hidden_size": heads * draw.choice("tower head dim", (24, 32) if draw.coarse else (8, 16)),
            "intermediate_size": draw.choice("tower intermediate", (24, 48)),
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "patch_size": draw.choice("patch", (2, 4, 6)),
            "pos_emb_height": side,
            "pos_emb_width": side,
            **draw_theta(draw, 0.2),
        }
        for name, value, usual in (
            ("merge_size", merge, 2),
            ("patch_temporal", draw.choice("frames of a patch", (2, 2, 1, 3)), 2),
        ):
            if value != usual or draw.varies(f"{name} stated", 0.5):
                fields[name] = value
        if draw.varies("tower layer types", 0.6):
            kinds = ("full_attention", "window_attention")
            fields["layer_types"] = [rng.choice(kinds) for _ in range(depth)]
        if draw.varies("tower activation", 0.2):
            fields["hidden_act"] = draw.choice("activation of the tower", ("gelu_pytorch_tanh", "relu"))
        return fields
