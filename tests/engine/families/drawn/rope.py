"""Draws the rotary fields of a decoder, in all the spellings that Transformers reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.engine.families.drawn.choices import Draw
from tests.engine.tiny import DELTA_NETS

#: Kinds of a decoder with images whose rotary type was never called by M-RoPE's name.
_GLM = ("glm", "glm4", "glm4_moe", "glm4v", "glm4v_moe", "glm_ocr")
_LATER = ("qwen3_vl", "qwen3_vl_moe", *DELTA_NETS, *_GLM, "paddleocr_vl", "hunyuan_vl", "ernie4_5_vl_moe")
#: The share of a head that rotates where the file does not say.
_SHARES = {
    **dict.fromkeys(DELTA_NETS, 0.25),
    **dict.fromkeys(_GLM, 0.5),
    **dict.fromkeys(("glm4v", "glm_ocr"), 1.0),
}
_HUNYUAN = ("hunyuan_v1_dense", "hunyuan_vl")
_SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True)
class Lengths:
    """The dependence of rotary frequencies on the length of a sequence.

    Attributes:
        original: longest sequence with the frequencies of short ones; None if they don't depend on it.
        crosses: the reference has an answer for a sequence that grows beyond ``original``. For longrope only
            Phi-3's class has one; others go on with other frequencies and mix keys of both.
    """

    original: int | None = None
    crosses: bool = True


def lengths_of(kind: str, fields: Mapping[str, Any]) -> Lengths:
    """The lengths of a decoder that :func:`tests.engine.families.drawn.decoder.draw_decoder` has drawn."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    scaling = rope.get("rope_type", rope.get("type"))
    if scaling == "dynamic" and "alpha" not in rope:
        return Lengths(fields["max_position_embeddings"])
    if scaling not in ("longrope", "su"):
        return Lengths()
    beside = fields.get("original_max_position_embeddings")
    within = rope.get("original_max_position_embeddings")
    return Lengths(beside or within or fields["max_position_embeddings"], kind == "phi3")


def nested_lengths_of(kind: str, fields: Mapping[str, Any]) -> Lengths:
    """The lengths of a decoder inside of another model, which doesn't compute again for other frequencies."""
    return replace(lengths_of(kind, fields), crosses=False) if kind == "phi3" else lengths_of(kind, fields)


def lengths_from_one(lengths: Lengths) -> Lengths:
    """``lengths`` for positions that count from 1: a sequence is one longer by them than by its tokens."""
    return lengths if lengths.original is None else replace(lengths, original=lengths.original - 1)


def draw_rope(draw: Draw, kind: str, fields: dict[str, Any], head_dim: int, section: bool) -> None:
    """Add rotary fields: the old spelling beside a ``rope_scaling``, or Transformers 5's ``rope_parameters``.

    Args:
        section: the rotary embedding has three axes.
    """
    if kind == "ministral3":
        _growing(draw, fields)
        return
    scalings = ("default", "longrope") if kind == "phi3" else _SCALINGS
    if kind in ("cohere2", "cohere2_moe", "exaone4", "muse_glimmer", "olmo3", "smollm3"):
        # Beside layers with other angles, or without any, frequencies by length are refused.
        scalings = _SCALINGS[:4]
    if kind == "ernie4_5_vl_moe":
        scalings = ("default",)
    scaling = draw.variant("rope scaling", scalings, 0.4)
    if kind in _HUNYUAN and draw.varies("rope of public files", 0.5):
        scaling = "dynamic"
    if section and scaling in ("llama3", "longrope"):
        scaling = "yarn"
    rope: dict[str, Any] = {}
    rotated = _rotated(draw, kind, fields, rope, head_dim)
    if scaling != "default":
        rope.update(_scaling(draw, kind, scaling, fields, rotated))
    if section:
        rope["mrope_section"] = _section(draw, rotated // 2)
        if kind == "ernie4_5_vl_moe":
            # Rows and columns have as many.
            same = draw.stream("mrope section").randint(1, rotated // 4 - 1 if rotated > 8 else 1)
            rope["mrope_section"] = [same, same, rotated // 2 - 2 * same]
        if kind == "hunyuan_vl":
            _four_axes(draw, rope, rotated // 2)
        if kind in ("qwen3_vl", "qwen3_vl_moe", *DELTA_NETS):
            rope["mrope_interleaved"] = True
    theta = draw.choice("rope theta", (1e4, 5e5, 1e6, 1e3))
    new = draw.varies("rope in the new spelling", 0.4) and kind != "olmo3"
    # Transformers' default of OLMo 3 has this name, and wins where the file has the other.
    name = "rope_type" if new or kind == "olmo3" else draw.choice("rope type's name", ("type", "rope_type"))
    if section and scaling == "default" and not new:
        rope[name] = "default" if kind in _LATER else draw.choice("mrope's name", ("mrope", "default"))
    elif scaling != "default" or new:
        rope[name] = "xdrope" if "xdrope_section" in rope and "alpha" in rope else scaling
    if draw.varies("rope theta absent", 0.1):
        theta = None
    if new:
        fields["rope_parameters"] = {**rope, **({"rope_theta": theta} if theta else {})}
        return
    if kind in _GLM and "partial_rotary_factor" in rope:
        # Public files state it beside the mapping.
        target = rope if draw.varies("rotated share within", 0.3) else fields
        target["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if theta:
        fields["rope_theta"] = int(theta) if draw.varies("rope theta an integer", 0.3) else theta
    if rope:
        fields["rope_scaling"] = rope
    elif draw.varies("rope scaling null", 0.4):
        fields["rope_scaling"] = None


def _rotated(draw: Draw, kind: str, fields: dict[str, Any], rope: dict[str, Any], head_dim: int) -> int:
    """Numbers of a head that rotate; their share is added where it isn't the kind's own."""
    if kind == "phi3" and head_dim % 16 == 0 and draw.varies("partial rotary", 0.3):
        fields["partial_rotary_factor"] = 0.75
        return int(head_dim * 0.75)
    if kind not in _SHARES:
        return head_dim
    usual = _SHARES[kind]
    share = draw.choice("rotated share", (0.25, 0.5, 1.0))
    share = share if int(head_dim * share) % 2 == 0 else 0.5
    if share != usual or draw.varies("rotated share stated", 0.7):
        rope["partial_rotary_factor"] = share
    return int(head_dim * share)


def _growing(draw: Draw, fields: dict[str, Any]) -> None:
    """Ministral-3's: queries grow with their position, in steps of the context before scaling."""
    if draw.varies("rope absent", 0.15):
        return
    name = draw.choice("rope type's name", ("rope_type", "type"))
    rope: dict[str, Any] = {
        name: draw.choice("type", ("yarn", "yarn", "default")),
        "rope_theta": draw.choice("rope theta", (1e4, 1e6)),
        "factor": draw.choice("rope factor", (16.0, 2.0)),
        "original_max_position_embeddings": draw.choice("original context", (8, 16, 33, 128)),
        "llama_4_scaling_beta": draw.choice("growth", (0.1, 0.3)),
    }
    if rope[name] == "yarn":
        draw.spelled(rope, "original_max_position_embeddings")
    if draw.varies("context among rotary parameters", 0.5):
        rope["max_position_embeddings"] = fields["max_position_embeddings"]
    if draw.varies("yarn betas", 0.5):
        rope |= {"beta_fast": 32.0, "beta_slow": draw.choice("beta slow", (1.0, 2.0))}
    if draw.varies("mscale", 0.7):
        rope |= {"mscale": 1.0, "mscale_all_dim": draw.choice("mscale all", (1.0, 0.5))}
    fields["rope_parameters"] = rope


def _scaling(draw: Draw, kind: str, scaling: str, fields: dict[str, Any], rotated: int) -> dict[str, Any]:
    """The fields of one kind of scaling. Its original context is short, so that prompts go beyond it."""
    factor = draw.choice("rope factor", (2.0, 4.0, 8.0, 1.5))
    original = draw.choice("original context", (16, 32, 64, 128))
    if scaling == "dynamic" and kind in _HUNYUAN and draw.varies("base raised once", 0.9):
        return {"factor": 1.0, "alpha": draw.choice("alpha", (50.0, 1000.0)), "mscale": 1.0}
    if scaling in ("linear", "dynamic"):
        if scaling == "dynamic" or draw.varies("stretched context", 0.3):
            fields["max_position_embeddings"] = math.ceil(fields["max_position_embeddings"] / factor)
        return {"factor": factor}
    if scaling == "longrope":
        return _longrope(draw, kind, fields, original, rotated)
    found: dict[str, Any] = {"factor": factor}
    if draw.varies("original context absent", 0.2):
        pass
    else:
        found["original_max_position_embeddings"] = original
    if scaling == "llama3":
        return {**found, "low_freq_factor": 1.0, "high_freq_factor": draw.choice("high freq", (4.0, 2.0))}
    if draw.varies("yarn betas", 0.3):
        found |= {
            "beta_fast": draw.choice("beta fast", (32, 16.0, 4)),
            "beta_slow": draw.choice("beta slow", (1, 2)),
        }
    how = draw.variant("yarn attention", ("derived", "stated", "mscale", "one mscale"), 0.4)
    if how == "stated":
        found["attention_factor"] = 0.9
    elif how == "mscale":
        found |= {"mscale": 0.7, "mscale_all_dim": draw.choice("mscale all", (1.0, 0.5))}
    elif how == "one mscale":
        found["mscale"] = 0.7
    if draw.varies("yarn truncate", 0.2):
        found["truncate"] = False
    return found


def _longrope(draw: Draw, kind: str, fields: dict[str, Any], original: int, rotated: int) -> dict[str, Any]:
    rng = draw.stream("longrope factors")
    found: dict[str, Any] = {
        "short_factor": [round(rng.uniform(1.0, 1.5), 3) for _ in range(rotated // 2)],
        "long_factor": [round(rng.uniform(1.5, 9.0), 3) for _ in range(rotated // 2)],
    }
    # Phi-3's class takes the field beside the dictionary, and its own default rather than one within.
    where = "beside" if kind == "phi3" else "within"
    target = fields if where == "beside" else found
    target["original_max_position_embeddings"] = original
    if draw.varies("longrope factor", 0.2):
        found["factor"] = 3.0
    if draw.varies("longrope attention factor", 0.2):
        found["attention_factor"] = 1.1
    return found


def _four_axes(draw: Draw, rope: dict[str, Any], angles: int) -> None:
    """Hunyuan's: mostly four axes, perhaps under older names."""
    if draw.varies("four axes", 0.7):
        bounds = sorted(draw.stream("axes").choices(range(angles + 1), k=3))
        ends = [*bounds, angles]
        rope["mrope_section"] = [end - start for start, end in zip([0, *bounds], ends, strict=True)]
    if draw.varies("older name of sections", 0.5):
        rope["xdrope_section"] = [float(size) for size in rope.pop("mrope_section")]


def _section(draw: Draw, angles: int) -> list[int]:
    rng = draw.stream("mrope section")
    first, second = sorted(rng.sample(range(1, angles), 2)) if angles > 2 else (1, 1)
    return [first, second - first, angles - second]
