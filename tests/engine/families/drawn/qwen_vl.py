"""Draws checkpoints of EXAONE 4.5, HyperCLOVA X, LFM3-VL and the Qwen-VL families, up to Qwen3.5-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.families import qwen
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
from tests.engine.families.drawn.lfm2 import draw_lfm3_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_theta
from tests.engine.families.lfm3_vl import HAS_LFM3_VL
from tests.engine.tiny import QWEN_SPECIALS, TRANSFORMERS, tokenizer

_MODEL_TYPES = {
    "Qwen2VL": "qwen2_vl",
    "Qwen2_5_VL": "qwen2_5_vl",
    "Exaone4_5_": "exaone4_5",
    "HyperCLOVAXVisionV2": "hyperclovax_vision_v2",
    "Qwen3VL": "qwen3_vl",
    "Qwen3_5": "qwen3_5",
    "Qwen3_5Moe": "qwen3_5_moe",
    "Qwen3VLMoe": "qwen3_vl_moe",
    "Lfm3Vl": "lfm3_vl",
}
_EXAONE, _HYPERCLOVAX = "Exaone4_5_", "HyperCLOVAXVisionV2"
#: The ``model_type`` of their decoders, which count positions as text models do. No positions tell a video's
#: pace.
_PLAIN = {_EXAONE: "exaone4", _HYPERCLOVAX: "hyperclovax"}
#: Its decoder and its tower are its own.
_LFM3 = "Lfm3Vl"


@dataclass(frozen=True)
class QwenVLFamily:
    """One of the families; ``kind`` is the beginning of its class names in Transformers."""

    kind: str

    @property
    def name(self) -> str:
        return _MODEL_TYPES[self.kind]

    @property
    def architectures(self) -> tuple[str, ...]:
        published = ("HCXVisionV2ForCausalLM",) if self.kind == _HYPERCLOVAX else ()
        return (f"{self.kind}ForConditionalGeneration", *published)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if self.kind == _HYPERCLOVAX and not qwen.HAS_HYPERCLOVAX:
            raise Unavailable("this release of Transformers has no HyperCLOVA X with images")
        if self.kind == _LFM3 and not HAS_LFM3_VL:
            raise Unavailable("this release of Transformers has no LFM3-VL")
        tok = tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tok.save_pretrained(path)
        # Times of Qwen3-VL's videos are text.
        long = draw.varies("long videos", 0.2)
        tokens = (4096 if self.kind.startswith(("Qwen3VL", _LFM3)) else 1024) if long else 512
        raw = self.config(draw, len(tok), tokens)
        architecture, *others = self.architectures
        # Its embeddings are multiplied.
        most = 0.3 if self.kind == _HYPERCLOVAX else 1.0
        model = write_model(draw, path, raw, architecture, most_embedding=most)
        draw_ends(draw, path, raw, 2, 0)
        if others and draw.varies("publisher's name", 0.5):
            raw |= {"model_type": "vlm", "architectures": others}
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        vision = {"spatial_merge_size": 2, "temporal_patch_size": 2, **raw["vision_config"]}
        cell = vision["patch_size"] * vision["spatial_merge_size"]
        self.write_processor(draw, path, vision, cell)
        fps = None
        kwargs: dict[str, Any] = {}
        bounds = None
        if draw.varies("bounds by option", 0.2):
            bounds = (
                cell**2 * draw.choice("least cells", (1, 5)),
                cell**2 * draw.choice("most cells", (9, 40)),
            )
            kwargs |= {"min_pixels": bounds[0], "max_pixels": bounds[1]}
        if self.kind != "Qwen2VL" and self.kind not in _PLAIN:
            fps = draw.choice("fps", (1.0, 2.0, 0.5) if self.kind == "Qwen2_5_VL" else (1.5, 24.0, 2.0, 0.3))
            if self.kind == "Qwen2_5_VL" and TRANSFORMERS < (5, 23):
                # These releases cut off fractions of seconds.
                fps = vision["temporal_patch_size"] / draw.choice("seconds per step", (1, 2))
            kwargs["fps"] = fps
        style = Style(
            qwen.FRAME,
            "<|im_end|>\n",
            placeholder=lambda index, count: qwen.IMAGE,
            video=qwen.LASTING_VIDEO if self.kind == _HYPERCLOVAX else qwen.VIDEO,
            area=60 * cell * cell,
            longest=draw.variant("longest images", (8.0, 100.0, 250.0), 0.2),
            frames=300 if long else 24,
        )
        media = frozenset({raw["image_token_id"], raw["video_token_id"]})
        lengths = lengths_of(self.name, raw.get("text_config") or raw)
        return Drawn(
            path,
            same_weights(qwen.Reference(path, self.kind, fps, bounds), model),
            style,
            tokens,
            {"mm_processor_kwargs": kwargs},
            media,
            lengths,
        )

    def config(self, draw: Draw, vocab: int, tokens: int) -> dict[str, Any]:
        """config.json without ``architectures``."""
        plain = self.kind in _PLAIN
        kind = _PLAIN.get(self.kind, self.name)
        text = (
            draw_lfm3_decoder(draw, vocab, tokens=tokens)
            if self.kind == _LFM3
            else draw_decoder(draw, kind, vocab, tokens=tokens, section=not plain)
        )
        special_names = ("image_pad", "video_pad", "vision_start", "vision_end")
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "vision_config": self._vision(draw, text["hidden_size"]),
            **{f"{m.removesuffix('_pad')}_token_id": QWEN_SPECIALS.index(f"<|{m}|>") for m in special_names},
        }
        text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        nested = plain or self.kind in qwen.TIMED or draw.varies("text_config", 0.4)
        if not nested:
            return {**raw, **text}
        tied = text.pop("tie_word_embeddings", None)
        for target in (raw, text):
            if tied is not None and draw.varies(
                f"tied stated {'within' if target is text else 'outside'}", 0.7
            ):
                target["tie_word_embeddings"] = tied
        if self.kind == _HYPERCLOVAX:
            text["model_type"] = kind
        elif self.kind == _EXAONE:
            text["model_type"] = draw.choice("text model_type", ("exaone4", "exaone4_5_text"))
        elif self.kind == _LFM3:
            raw["projector_hidden_size"] = draw.choice("projector width", (24, 40))
            raw["projector_bias"] = draw.variant("projector bias", (True, False), 0.3)
            raw["projector_hidden_act"] = draw.variant("projector activation", ("gelu", "silu"), 0.3)
            draw.spelled(raw, "projector_bias", "projector_hidden_act")
            text["model_type"] = "lfm3"
        elif self.kind in qwen.TIMED or draw.varies("text model_type", 0.6):
            text["model_type"] = f"{self.name}_text"
        return {**raw, "text_config": text}

    def _vision(self, draw: Draw, hidden: int) -> dict[str, Any]:
        heads = draw.choice("tower heads", (1, 2, 3, 4))
        # Its rotary embedding has two axes.
        width = heads * draw.choice("tower head dim", (24, 32) if draw.coarse else (8, 16, 24))
        depth = draw.integer("tower layers", 1, 4)
        rng = draw.stream("tower lists")
        fields: dict[str, Any] = {
            "depth": depth,
            "num_heads": heads,
            "patch_size": draw.choice("patch", (2, 4, 6)),
            "spatial_merge_size": draw.choice("merge", (2, 2, 2, 1, 3)),
            "temporal_patch_size": draw.choice("temporal patch", (2, 2, 2, 1, 3)),
        }
        for field, default in (("spatial_merge_size", 2), ("temporal_patch_size", 2)):
            if fields[field] == default and draw.varies(f"{field} absent", 0.1):
                del fields[field]
        if draw.varies("channels stated", 0.4):
            fields[draw.choice("channels' name", ("in_channels", "in_chans"))] = 3
        if self.kind == _LFM3:
            return {**fields, **_convolving(draw, width, heads, depth)}
        act = draw.variant("tower activation", ("", "gelu", "gelu_pytorch_tanh", "relu", "swish"), 0.2)
        if act:
            fields["hidden_act"] = act
        fields |= draw_theta(draw, 0.2)
        if self.kind == "Qwen2VL":
            fields |= {
                "embed_dim": width,
                "hidden_size": hidden,
                "mlp_ratio": draw.choice("mlp ratio", (2, 4)),
            }
            return fields
        fields |= {
            "hidden_size": width,
            "out_hidden_size": hidden,
            "intermediate_size": draw.choice("tower intermediate", (24, 48, 52)),
        }
        if self.kind == _HYPERCLOVAX:
            fields["out_hidden_size"] = draw.choice("merged width", (16, 40))
            fields["model_type"] = draw.choice("tower's type", ("qwen2_5_vl", "qwen2_5_vl_vision"))
        if self.kind in ("Qwen2_5_VL", *_PLAIN):
            cell = fields["patch_size"] * fields.get("spatial_merge_size", 2)
            fields["window_size"] = cell * draw.integer("window rows", 1, 4)
            fields["fullatt_block_indexes"] = sorted(rng.sample(range(depth), rng.randint(0, depth)))
            if self.kind == _EXAONE:
                shares = [count for count in range(1, heads + 1) if heads % count == 0]
                fields["num_key_value_heads"] = draw.choice("tower kv heads", shares)
            elif self.kind == "Qwen2_5_VL" and draw.varies("tokens per second", 0.6):
                fields["tokens_per_second"] = rng.choice((1, 2, 25))
            return fields
        side = draw.integer("position table's side", 2, 7)
        fields["num_position_embeddings"] = side * side
        if self.kind.startswith("Qwen3_5"):
            return fields
        layers = draw.choice("deepstack layers", (0, 1, 2, 3))
        fields["deepstack_visual_indexes"] = rng.sample(range(depth), min(layers, depth))
        return fields

    def write_processor(self, draw: Draw, path: Path, vision: dict[str, Any], cell: int) -> None:
        """preprocessor_config.json, with bounds in one of three spellings, and perhaps one for videos."""
        rng = draw.stream("pixel bounds")
        sizes = {"patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"]}
        sizes["temporal_patch_size"] = vision["temporal_patch_size"]

        def bounds(name: str) -> dict[str, Any]:
            low, high = cell**2 * rng.choice((1, 4, 6)), cell**2 * rng.choice((12, 30, 60))
            how = draw.choice(name, ("size", "pixels", "both"))
            size = {"shortest_edge": low, "longest_edge": high}
            if self.kind in qwen.TIMED and how != "size":
                # Of videos the size counts, which is large where the file states none.
                size, how = {"shortest_edge": cell**2 * 2, "longest_edge": cell**2 * 40}, "both"
            return {
                **({"size": size} if how != "pixels" else {}),
                **({"min_pixels": low, "max_pixels": high} if how != "size" else {}),
            }

        pixels = draw_pixels(draw)
        if self.kind in qwen.TIMED:
            pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **pixels}
        stated = {"image_processor_type": "Qwen2VLImageProcessor", **sizes, **pixels, **bounds("bounds")}
        write_json(path / "preprocessor_config.json", stated)
        if draw.varies("videos' own bounds", 0.4):
            low, high = cell**2 * rng.choice((1, 4)), cell**2 * rng.choice((8, 16))
            size = {"shortest_edge": low, "longest_edge": high * (4 if self.kind in qwen.TIMED else 1)}
            write_json(path / "video_preprocessor_config.json", {**sizes, **pixels, "size": size})


def _convolving(draw: Draw, width: int, heads: int, depth: int) -> dict[str, Any]:
    """Fields of LFM3-VL's tower."""
    rng = draw.stream("tower layers' kinds")
    shares = [count for count in range(1, heads + 1) if heads % count == 0]
    return {
        "hidden_size": width,
        "intermediate_size": draw.choice("tower intermediate", (24, 48, 52)),
        "num_hidden_layers": depth,
        "layer_types": [rng.choice(("conv", "full_attention")) for _ in range(depth)],
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice("tower kv heads", shares),
        "conv_kernel_size": draw.variant("tower's kernel", (3, 1, 5), 0.4),
        "norm_eps": draw.variant("tower norm eps", (1e-5, 1e-3), 0.3),
        **draw_theta(draw, 0.3),
    }
