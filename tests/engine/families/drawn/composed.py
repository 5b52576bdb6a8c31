"""Draws checkpoints of the families whose references are composed: Phi-3.5-vision and MiniCPM-V."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.engine.families import minicpm_v_reference as minicpm_v
from tests.engine.families import phi3_v_reference as phi3_v
from tests.engine.families.drawn.checkpoint import Drawn
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import Lengths, lengths_of
from tests.engine.families.drawn.vision import draw_tower
from tests.engine.families.qwen import FRAME
from tests.engine.tiny import split_shards

#: Fields of the decoder that only Transformers' own configuration of it knows.
_LATER = ("rope_parameters",)


def _phi3_v_placeholder(reverse: bool, index: int, count: int) -> str:
    return f"<|image_{count - index if reverse else index + 1}|>"


@dataclass(frozen=True)
class Phi3VFamily:
    """Phi-3.5-vision, and VLM2Vec, which differs by its prompts."""

    name: str
    architectures: tuple[str, ...] = ("Phi3VForCausalLM",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tokens = 512
        vocab = len(phi3_v.phi3_v_tokenizer())
        fields = draw_decoder(draw, "phi3", vocab, tokens=tokens)
        # Public files have longrope, whose switch prompts reach.
        angles = _head_dim(fields) // 2
        rng = draw.stream("longrope factors")
        original = draw.choice("original context", (64, 128, 256, 1024))
        for field in ("rope_parameters", "rope_scaling", "partial_rotary_factor"):
            fields.pop(field, None)
        fields |= {
            "rope_theta": 10000.0,
            "original_max_position_embeddings": original,
            "max_position_embeddings": max(tokens, 4 * original),
            "rope_scaling": {
                "type": draw.choice("longrope's name", ("su", "longrope")),
                "short_factor": [round(rng.uniform(1.0, 1.5), 3) for _ in range(angles)],
                "long_factor": [round(rng.uniform(1.5, 9.0), 3) for _ in range(angles)],
            },
        }
        patch = draw.choice("patch", (4, 7))
        unit = patch * draw.choice("patches per side", (2, 4, 6))
        tower = draw_tower(draw, side=unit, patch=patch)
        raw = phi3_v.configuration(vocab)
        # What draw_decoder leaves out is absent here too.
        raw = {name: value for name, value in raw.items() if name in fields or name not in _DECODER_FIELDS}
        raw |= {**fields, "vision_config": tower}
        crops = draw.choice("num_crops", (1, 2, 4, 9))
        phi3_v.make_phi3_v(path, seed=draw.seed % 1000, num_crops=crops, raw=raw)
        if draw.varies("shards", 0.15):
            split_shards(path)
        options: dict[str, Any] = {}
        if draw.varies("num_crops by option", 0.3):
            crops = draw.choice("num_crops of the option", (1, 3, 6))
            options["mm_processor_kwargs"] = {"num_crops": crops}
        frame, end = (
            ("{}", "\n") if self.name == "vlm2vec" else ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>\n")
        )
        placeholder = partial(_phi3_v_placeholder, draw.varies("images in reverse", 0.3))
        style = Style(frame, end, placeholder=placeholder, longest=20.0, several=3)
        image = min(32044, raw["vocab_size"] - 1)
        reference = phi3_v.Phi3VReference(path, crops)
        # Phi-3's class looks for the crossing in token ids; this reference gives it embeddings.
        lengths = Lengths(original, crosses=False)
        return Drawn(path, reference, style, tokens, options, frozenset({image}), lengths)


_DECODER_FIELDS = frozenset(
    {"num_key_value_heads", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "sliding_window"}
)


def _head_dim(fields: dict[str, Any]) -> int:
    return fields["hidden_size"] // fields["num_attention_heads"]


class MiniCPMVFamily:
    """MiniCPM-V 2.6, 4.0 and 4.5."""

    name = "minicpm_v"
    architectures = ("MiniCPMV",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        vocab = len(minicpm_v.minicpm_v_tokenizer())
        version = draw.variant("version", tuple(minicpm_v.DECODERS), 0.5)
        kind = minicpm_v.DECODERS[version].lower()
        text = draw_decoder(draw, kind, vocab, tokens=768, width_of=128)
        text |= {"bos_token_id": 0, "eos_token_id": 2}
        patch = draw.choice("patch", (4, 7))
        tower = draw_tower(draw, side=patch * draw.choice("table's side", (5, 7, 10)), patch=patch)
        tower = {name: tower[name] for name in minicpm_v.VISION}
        queries = draw.choice("queries", (1, 4, 9))
        slices = draw.choice("most slices", (1, 2, 4, 9))
        raw = {
            **text,
            "version": version,
            "vision_config": {**tower, "model_type": "siglip"},
            "patch_size": patch,
            "query_num": queries,
            "drop_vision_last_layer": draw.variant("last layer dropped", (False, True), 0.3),
            "slice_config": {"max_slice_nums": slices, "patch_size": patch, "model_type": "minicpmv"},
        }
        processor = {
            "patch_size": patch,
            "image_feature_size": queries,
            "max_slice_nums": slices,
            "scale_resolution": patch * draw.choice("resolution in patches", (3, 4, 6)),
            "use_image_id": draw.variant("images numbered", (True, False), 0.3),
        }
        minicpm_v.make(path, seed=draw.seed % 1000, processor=processor, **raw)
        if draw.varies("shards", 0.15):
            split_shards(path)
        options: dict[str, Any] = {}
        limit = None
        if draw.varies("slices by option", 0.3):
            limit = draw.choice("slices of the option", (1, 3, 6))
            options["mm_processor_kwargs"] = {"max_slice_nums": limit}
        style = Style(
            FRAME,
            "<|im_end|>\n",
            placeholder=lambda index, count: minicpm_v.IMAGE,
            longest=20.0,
            several=3,
        )
        reference = minicpm_v.MiniCPMVReference(path, limit)
        image = minicpm_v.SPECIALS.index("<unk>")
        media, lengths = frozenset({image, 128244}), lengths_of(kind, text)
        # The terminators of its own code.
        ends = {minicpm_v.SPECIALS.index("<|im_end|>")}
        if version != 4.0:
            ends.add(minicpm_v.SPECIALS.index("<|endoftext|>"))
        return Drawn(path, reference, style, 768, options, media, lengths, frozenset(ends))
