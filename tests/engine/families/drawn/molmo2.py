"""Draws Molmo 2 checkpoints."""

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
from tests.engine.families.drawn.rope import Lengths, lengths_of
from tests.engine.families.drawn.vision import draw_pixels
from tests.engine.families.molmo2 import (
    FRAME,
    HAS_MOLMO2,
    IMAGE,
    PICTURES,
    VIDEO,
    VIDEOS,
    Molmo2Reference,
    molmo_tokenizer,
)

_TOKENS = 1024
_ARCHITECTURE = "Molmo2ForConditionalGeneration"


class MolmoFamily:
    """A tower of two chosen layers, windows of any shape, and Qwen3 with tokens that no answer has."""

    name = "molmo2"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if not HAS_MOLMO2:
            raise Unavailable("this release of Transformers has no Molmo 2")
        tok = molmo_tokenizer()
        tok.save_pretrained(path)
        pictures = tok.convert_tokens_to_ids(list(PICTURES))
        text = draw_decoder(draw, "molmo2", pictures[0], tokens=_TOKENS)
        text.pop("tie_word_embeddings", None)
        text["additional_vocab_size"] = len(PICTURES) + draw.variant("further tokens", (0, 1, 6), 0.3)
        if draw.varies("norm of OLMo", 0.3):
            text["qk_norm_type"] = "olmo"
        if draw.varies("norms behind", 0.3):
            text["norm_after"] = True
        if draw.varies("layers of the scaling", 0.3):
            rng, layers = draw.stream("layers of the scaling"), range(text["num_hidden_layers"])
            some = lengths_of("molmo2", text) == Lengths()
            text["rope_scaling_layers"] = [each for each in layers if not some or rng.random() < 0.5]
        patch = draw.choice("patch", (14, 16))
        side = draw.choice("patches per side", (5, 6))
        vision = _vision(draw, patch, side)
        adapter = _adapter(draw, vision, text["hidden_size"])
        raw: dict[str, Any] = {
            "model_type": "molmo2",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": vision,
            "adapter_config": adapter,
            "image_patch_id": tok.convert_tokens_to_ids("<im_patch>"),
        }
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        margins = draw.choice("margins", ([1, 1], [0, 0], [2, 1], [0, 2]))
        crops = draw.choice("most crops", (1, 2, 4, 6))
        pixels = {field: value for field, value in draw_pixels(draw).items() if field != "resample"}
        images: dict[str, Any] = {
            "image_processor_type": "Molmo2ImageProcessor",
            "size": {"height": patch * side, "width": patch * side},
            "patch_size": patch,
            "overlap_margins": margins,
            "pooling_size": draw.choice("window", ([2, 2], [3, 3], [1, 2], [4, 3])),
            "max_crops": crops,
            **pixels,
        }
        videos: dict[str, Any] = {
            "video_processor_type": "Molmo2VideoProcessor",
            **VIDEOS,
            "size": images["size"],
            "patch_size": patch,
            **pixels,
            "pooling_size": draw.choice("window of frames", ([3, 3], [2, 2], [4, 1])),
        }
        own = {
            "image_use_col_tokens": draw.variant("columns", (True, False), 0.3),
            "use_single_crop_col_tokens": draw.variant("columns of the whole", (None, True, False), 0.5),
            "use_single_crop_start_token": draw.variant("start of the whole", (True, False), 0.3),
            "video_use_col_tokens": draw.variant("columns of frames", (False, True), 0.3),
            "use_frame_special_tokens": draw.variant("tokens of frames", (True, False), 0.3),
        }
        draw.spelled(own, *own)
        write_json(
            path / "processor_config.json", {**own, "image_processor": images, "video_processor": videos}
        )
        kwargs: dict[str, Any] = {}
        if draw.varies("crops by option", 0.2):
            kwargs["max_crops"] = crops = draw.choice("crops of the option", (1, 3))
        return Drawn(
            path,
            same_weights(Molmo2Reference(path, **kwargs), model),
            Style(
                FRAME,
                "<|im_end|>\n",
                placeholder=lambda index, count: IMAGE,
                area=(2 * patch * side) ** 2,
                several=2,
                video=VIDEO,
                frames=9,
            ),
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset(pictures),
            lengths=lengths_of("molmo2", text),
            together=_TOKENS,
        )


def _vision(draw: Draw, patch: int, side: int) -> dict[str, Any]:
    heads, head_dim = draw.choice("tower heads", (1, 2, 3)), draw.choice("tower head dim", (8, 16, 24))
    if draw.coarse:
        head_dim = 32
    vision = {
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice("tower intermediate", (24, 48, 64)),
        "num_hidden_layers": draw.integer("tower layers", 2, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "image_size": [patch * side] * 2,
        "patch_size": patch,
        "hidden_act": draw.variant("tower activation", ("gelu_pytorch_tanh", "gelu", "relu"), 0.3),
        "layer_norm_eps": draw.variant("tower norm eps", (1e-6, 1e-3), 0.3),
        "attention_bias": draw.variant("tower bias", (True, False), 0.2),
    }
    plain = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_bias": True}
    for field, value in plain.items():
        if vision[field] == value:
            draw.spelled(vision, field)
    return vision


def _adapter(draw: Draw, vision: dict[str, Any], hidden: int) -> dict[str, Any]:
    layers, rng = vision["num_hidden_layers"], draw.stream("feature layers")
    chosen = [rng.choice(range(-layers, layers)) for _ in range(rng.choice((1, 2, 2, 3)))]
    return {
        # A feature's width is multiplied by the number of layers, so that this one is the tower's.
        "hidden_size": vision["hidden_size"],
        "num_attention_heads": vision["num_attention_heads"],
        "num_key_value_heads": vision["num_attention_heads"],
        "head_dim": vision["head_dim"],
        "vision_feature_layer": chosen,
        "intermediate_size": draw.choice("adapter intermediate", (24, 40)),
        "text_hidden_size": hidden,
        "attention_bias": draw.variant("adapter bias", (True, False), 0.2),
        "mlp_bias": draw.variant("adapter MLP bias", (False, True), 0.3),
        "hidden_act": draw.variant("adapter activation", ("silu", "gelu"), 0.2),
    }
