"""Draws Gemma 4 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.drawn.checkpoint import (
    Drawn,
    draw_ends,
    place_tied,
    same_weights,
    save,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.vision import draw_pixels
from tests.engine.families.gemma4 import (
    FRAME,
    IMAGE,
    MEDIA_TOKENS,
    SPECIALS,
    VIDEO,
    Gemma4Reference,
    draw_gemma4_buffers,
    gemma4_tokenizer,
)
from tests.engine.families.gemma4_unified import Gemma4UnifiedReference

_TOKENS = 768
_KINDS = ("sliding_attention", "full_attention")


class Gemma4Family:
    """Layers of two kinds with heads of their own, borrowed keys, inputs of layers, towers with bounds; or
    none of the last two.

    Args:
        unified: draws Gemma 4 unified.
    """

    def __init__(self, unified: bool = False) -> None:
        self._unified = unified
        self.name = "gemma4_unified" if unified else "gemma4"
        self._reference = Gemma4UnifiedReference if unified else Gemma4Reference
        self.architectures = (self._reference.architecture,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = gemma4_tokenizer()
        tok.save_pretrained(path)
        rows, frame_rows = draw.choice("rows", (4, 9, 16)), draw.choice("rows of a frame", (2, 6))
        patch, side = draw.choice("patch", (4, 5)), draw.choice("patches per row", (2, 3))
        text = draw_gemma4_decoder(draw, len(tok), self._unified)
        both_ways = draw.varies("images attend both ways", 0.5)
        if both_ways:
            text["use_bidirectional_attention"] = "vision"
            # Releases of Transformers differ in what they make of longer images.
            text["sliding_window"] = max(text["sliding_window"], max(rows, frame_rows) + 2)
        elif self._unified:
            text["use_bidirectional_attention"] = None
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": _draw_projection(draw, patch, side, rows)
            if self._unified
            else _draw_tower(draw, patch, side),
            "audio_config": None,
            **MEDIA_TOKENS,
            "audio_token_id": text["vocab_size"] - 1,
        }
        place_tied(draw, raw, text)
        model = write_model(draw, path, raw, *self.architectures, most_embedding=0.1)
        draw_gemma4_buffers(model, 0.25)
        save(draw, path, model, None)
        draw_ends(draw, path, text, 1, SPECIALS.index("<turn|>"))
        write_json(path / "config.json", {"architectures": list(self.architectures), **raw})
        sizes = {"patch_size": patch, "pooling_kernel_size": side}
        pixels = draw_pixels(draw)
        if "image_mean" in pixels:
            # Images use it where the file says so, videos in any case.
            pixels.setdefault("do_normalize", True)
        stated = {
            "image_processor": {**sizes, **pixels, "max_soft_tokens": rows},
            "video_processor": {**sizes, **pixels, "max_soft_tokens": frame_rows},
        }
        write_json(path / "processor_config.json", stated)
        kwargs: dict[str, Any] = {}
        if draw.varies("rows by option", 0.3):
            kwargs["max_soft_tokens"] = draw.choice("rows of the option", (4, 10))
        style = Style(FRAME, "<turn|>\n", placeholder=lambda index, count: IMAGE, video=VIDEO, frames=4)
        return Drawn(
            path,
            same_weights(self._reference(path, **kwargs), model),
            style,
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset({MEDIA_TOKENS["image_token_id"], MEDIA_TOKENS["video_token_id"]}),
            together=max(rows, frame_rows, *kwargs.values()) if both_ways else 1,
        )


def _draw_tower(draw: Draw, patch: int, side: int) -> dict[str, Any]:
    heads, head_dim = draw.choice("tower heads", (1, 2, 3)), draw.choice("tower head dim", (8, 16, 24))
    tower: dict[str, Any] = {
        "model_type": "gemma4_vision",
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice("tower intermediate", (24, 48, 64)),
        "num_hidden_layers": draw.integer("tower layers", 1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "patch_size": patch,
        "pooling_kernel_size": side,
        "position_embedding_size": 100,
        "use_clipped_linears": draw.varies("bounds", 0.5),
        "standardize": draw.varies("standardised", 0.5),
    }
    if draw.varies("tower theta", 0.3):
        tower["rope_parameters"] = {"rope_type": "axial", "rope_theta": 30.0}
    if draw.varies("tower norm eps", 0.3):
        tower["rms_norm_eps"] = 1e-3
    if draw.varies("tower activation", 0.2):
        tower["hidden_activation"] = draw.choice("tower's activation", ("gelu", "silu"))
    return tower


def _draw_projection(draw: Draw, patch: int, side: int, rows: int) -> dict[str, Any]:
    width = draw.choice("width", (24, 40))
    vision: dict[str, Any] = {
        "model_type": "gemma4_unified_vision",
        "patch_size": patch,
        "pooling_kernel_size": side,
        "mm_embed_dim": width,
        "output_proj_dims": width,
        "mm_posemb_size": max(rows, 10) + draw.choice("further positions", (0, 7)),
    }
    if draw.varies("norm eps of the projection", 0.3):
        vision["rms_norm_eps"] = 1e-3
    return vision


def draw_gemma4_decoder(draw: Draw, vocab: int, unified: bool = False) -> dict[str, Any]:
    """``text_config``; the last token of the vocabulary is none of the tokenizer's.

    Args:
        unified: of Gemma 4 unified, which has neither experts nor inputs of layers.
    """
    heads = draw.choice("heads", (1, 2, 4))
    kv = [n for n in (1, 2, 4) if heads % n == 0]
    layers = draw.choice("layers", (2, 3, 5, 6), (1, 2, 3, 3))
    rng = draw.stream("layer types")
    kinds = [rng.choice(_KINDS) for _ in range(layers)]
    kinds[-1] = "full_attention"
    vocab += draw.choice("padded vocabulary", (1, 13, 64))
    text: dict[str, Any] = {
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "vocab_size": vocab,
        "hidden_size": draw.choice("hidden", (32, 48, 64)),
        "intermediate_size": draw.choice("intermediate", (32, 48, 96)),
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice("kv heads", kv),
        "head_dim": draw.choice("head dim", (8, 16, 32)),
        "global_head_dim": draw.choice("global head dim", (16, 24, 32)),
        "max_position_embeddings": draw.choice("max position", (_TOKENS, 4096)),
        "rms_norm_eps": draw.choice("norm eps", (1e-6, 1e-5, 1e-3)),
        "sliding_window": draw.choice("window", (7, 16, 33, 4096)),
        "hidden_activation": draw.variant("activation", ("gelu_pytorch_tanh", "silu", "gelu"), 0.2),
        "final_logit_softcapping": draw.choice("cap", (30.0, 3.0, None)),
        "tie_word_embeddings": draw.variant("tied", (True, False), 0.2),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if not unified:
        text["hidden_size_per_layer_input"] = draw.choice("inputs of layers", (0, 8, 12))
        text["vocab_size_per_layer_input"] = vocab + draw.variant("more inputs", (0, 5), 0.2)
    if draw.varies("keys are values", 0.4):
        text["attention_k_eq_v"] = True
    if draw.varies("global kv heads stated", 0.5):
        text["num_global_key_value_heads"] = draw.choice("global kv heads", kv)
    most = next((n for n in range(layers) if set(kinds[: n + 1]) == set(kinds)), layers - 1)
    if layers - 1 - most > 0 and draw.varies("borrowing layers", 0.6):
        text["num_kv_shared_layers"] = draw.integer("number of borrowing layers", 1, layers - 1 - most)
        text["use_double_wide_mlp"] = draw.varies("wide", 0.5)
        if not unified:
            # Transformers' class can't do without.
            text["hidden_size_per_layer_input"] = draw.choice("inputs beside borrowed keys", (8, 12))
    if not unified and draw.varies("experts", 0.35):
        count = draw.choice("number of experts", (4, 8))
        text |= {
            "enable_moe_block": True,
            "num_experts": count,
            "top_k_experts": draw.choice("experts of a token", (1, 2, 3)),
            "moe_intermediate_size": draw.choice("intermediate of experts", (24, 32)),
        }
    if draw.varies("rope stated", 0.6):
        full = {"rope_type": "proportional", "rope_theta": draw.choice("theta", (1e6, 1e4))}
        if draw.varies("share stated", 0.7):
            full["partial_rotary_factor"] = draw.choice("share", (0.25, 0.5, 1.0))
        if draw.varies("factor stated", 0.3):
            full["factor"] = 4.0
        local = {"rope_type": "default", "rope_theta": draw.choice("local theta", (1e4, 300.0))}
        text["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    draw.spelled(text, "rms_norm_eps", "hidden_activation", "tie_word_embeddings")
    return text
