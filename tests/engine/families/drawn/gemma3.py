"""Draws Gemma 3 checkpoints with images."""

from __future__ import annotations

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
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.vision import draw_pixels, draw_tower, hub_name
from tests.engine.families.gemma3 import FRAME, IMAGE, SPECIALS, Gemma3Reference, gemma3_tokenizer

_TOKENS = 768
_ARCHITECTURE = "Gemma3ForConditionalGeneration"
_ROW = SPECIALS.index("<image_soft_token>")


class Gemma3Family:
    """SigLIP, averaged squares of features, layers with and without a window, and pan and scan."""

    name = "gemma3"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = gemma3_tokenizer()
        tok.save_pretrained(path)
        patch, side = draw.choice("patch", (4, 5, 7)), draw.choice("rows per side", (1, 2, 3))
        factor = draw.choice("patches per row", (1, 2, 3))
        pixels = patch * side * factor + draw.variant("pixels without a patch", (0, 1, patch - 1), 0.2)
        tower = draw_tower(draw, side=pixels, patch=patch)
        tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        text = draw_gemma3_decoder(draw, len(tok), side * side)
        raw: dict[str, Any] = {
            "model_type": "gemma3",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "mm_tokens_per_image": side * side,
            "boi_token_index": SPECIALS.index("<start_of_image>"),
            "eoi_token_index": SPECIALS.index("<end_of_image>"),
            "image_token_index": _ROW,
        }
        place_tied(draw, raw, text)
        model = write_model(
            draw, path, raw, _ARCHITECTURE, hub_name if draw.varies("hub names", 0.5) else None
        )
        draw_ends(draw, path, text, 1, SPECIALS.index("<end_of_turn>"))
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        stated = {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": pixels, "width": pixels},
            **draw_pixels(draw),
        }
        own = {"processor_class": "Gemma3Processor", "image_seq_length": side * side}
        if draw.varies("processor config around", 0.4):
            write_json(path / "processor_config.json", {**own, "image_processor": stated})
        else:
            write_json(path / "processor_config.json", own)
            write_json(path / "preprocessor_config.json", stated)
        kwargs: dict[str, Any] = {}
        if draw.varies("pan and scan", 0.4):
            kwargs = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": draw.choice("least", (5, 9, 14))}
            if draw.varies("most crops", 0.4):
                kwargs["pan_and_scan_max_num_crops"] = draw.choice("crops", (2, 3, 6))
        style = Style(
            FRAME.removeprefix("<bos>"),
            "<end_of_turn>\n",
            placeholder=lambda index, count: IMAGE,
            longest=20.0,
        )
        return Drawn(
            path,
            same_weights(Gemma3Reference(path, **kwargs), model),
            style,
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset({_ROW, SPECIALS.index("<start_of_image>")}),
            together=side * side,
        )


def draw_gemma2_decoder(draw: Draw, vocab: int) -> dict[str, Any]:
    """config.json of a Gemma 2: as Gemma 3's, with one rotary base, and caps of scores and logits."""
    text = draw_gemma3_decoder(draw, vocab, rows=0)
    for field in ("sliding_window_pattern", "rope_parameters", "rope_scaling", "rope_local_base_freq"):
        text.pop(field, None)
    caps = {"attn_logit_softcapping": (50.0, 2.0, None), "final_logit_softcapping": (30.0, 3.0, None)}
    text |= {field: draw.choice(field, values) for field, values in caps.items()}
    draw.spelled(text, *caps)
    return {**text, "model_type": "gemma2", "rope_theta": draw.choice("theta of all", (1e4, 300.0))}


def draw_gemma3_decoder(draw: Draw, vocab: int, rows: int) -> dict[str, Any]:
    """``text_config``; a window is longer than an image's ``rows``, as in public models: releases of
    Transformers differ in what they make of longer images."""
    heads, head_dim = draw.choice("heads", (1, 2, 4)), draw.choice("head dim", (8, 16, 32))
    if draw.coarse:
        heads, head_dim = 8, 32
    layers = draw.choice("layers", (1, 2, 3, 4), (1, 4, 2, 1))
    text: dict[str, Any] = {
        "model_type": "gemma3_text",
        "vocab_size": vocab + draw.variant("padded vocabulary", (0, 1, 13, 64), 0.2),
        "hidden_size": heads * draw.choice("hidden per head", (8, 16, 20)),
        "intermediate_size": draw.choice("intermediate", (32, 48, 96)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice("kv heads", [n for n in (1, 2, 4, 8) if heads % n == 0]),
        "head_dim": head_dim,
        "max_position_embeddings": draw.choice("max position", (_TOKENS, 4096)),
        "query_pre_attn_scalar": draw.choice("scalar", (head_dim, 20, 100)),
        "rms_norm_eps": draw.choice("norm eps", (1e-6, 1e-5, 1e-3)),
        "sliding_window": max(rows + 2, draw.choice("window", (7, 16, 33, 4096))),
        "hidden_activation": draw.variant("activation", ("gelu_pytorch_tanh", "silu", "gelu"), 0.2),
        "tie_word_embeddings": draw.variant("tied", (True, False), 0.2),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    how = draw.variant("layers spelled", ("pattern", "types", "neither"), 0.5)
    if how == "pattern":
        text["sliding_window_pattern"] = draw.choice("pattern", (1, 2, 3))
    elif how == "types":
        rng = draw.stream("layer types")
        kinds = ("sliding_attention", "full_attention")
        text["layer_types"] = [rng.choice(kinds) for _ in range(layers)]
    scaling = draw.variant("rope scaling", ({}, {"rope_type": "linear", "factor": 8.0}), 0.5)
    theta, local = draw.choice("theta", (1e6, 1e4)), draw.choice("local theta", (1e4, 300.0))
    if draw.varies("rope in the new spelling", 0.4):
        text["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": theta, **scaling},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    else:
        text |= {"rope_theta": theta, "rope_local_base_freq": local, "rope_scaling": scaling or None}
    draw.spelled(text, "rms_norm_eps", "hidden_activation", "tie_word_embeddings")
    return text
