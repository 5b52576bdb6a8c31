"""Reads the rotary embedding of a language model from its config.json, as Transformers' classes do.

The parameters are a mapping: ``rope_scaling`` in older files, ``rope_parameters`` in those of Transformers 5;
``rope_scaling`` wins where both are there. Some of them may also stand beside it, at the top level.
"""

from __future__ import annotations

import math
from typing import Any, cast

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, integer, number, numbers
from engine.families.parsing.gemma4 import GEMMA4_KINDS
from engine.families.parsing.windows import unscaled_layers
from engine.layers.decoder_config import RopeConfig, RopeType

_PARAM = "rope_scaling"
_HUNYUAN = ("hunyuan_v1_dense", "hunyuan_vl_text")
_QWEN3_5 = ("qwen3_5_moe_text", "qwen3_5_text")
#: Names that older files use for another type, by the kind of decoder that knows them.
_ALIASES: dict[str, dict[Any, str]] = {
    "qwen2_vl": {"mrope": "default"},
    "glm4v_text": {"mrope": "default"},
    "glm4v_moe_text": {"mrope": "default"},
    **{kind: {"mrope": "default"} for kind in _QWEN3_5},
    "qwen3_vl": {"mrope": "default"},
    "qwen3_vl_moe": {"mrope": "default"},
    "phi3": {"su": "longrope", "yarn": "longrope"},
    "hunyuan_vl_text": {"xdrope": "dynamic"},
}
_TYPES: dict[str, tuple[RopeType, ...]] = {
    **dict.fromkeys((*GEMMA4_KINDS, "lfm3"), ("default", "linear", "proportional")),
    "ernie4_5_vl_moe_text": ("default",),
    "phi3": ("default", "longrope"),
}
_ALL_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
#: Kinds whose neighbouring dimensions rotate against each other.
_GLM = ("glm", "glm4", "glm4v_text", "glm_ocr_text")
_ERNIE = ("ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe_text")
_ADJACENT = ("cohere", "cohere2", "cohere2_moe", *_ERNIE, *_GLM)
#: The share of a head that rotates, by the kinds that rotate a part where the file states none.
_SHARES = {
    **dict.fromkeys(_QWEN3_5, 0.25),
    **dict.fromkeys(("glm", "glm4", "glm4_moe", "glm4v_moe_text"), 0.5),
}
#: Kinds that can rotate a part of a head.
_PARTIAL = ("phi3", *_GLM, *_SHARES)
#: In models whose layers differ, parameters may be given for each of these.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
#: Angles per axis of M-RoPE where the file has none; None where it has to state them.
_SECTIONS: dict[str, tuple[int, ...] | None] = {
    "ernie4_5_vl_moe_text": (22, 22, 20),
    "paddleocr_vl": (16, 24, 24),
    "qwen2_vl": (16, 24, 24),
    "glm4v_moe_text": (8, 12, 12),
    "glm4v_text": (8, 12, 12),
    "glm_ocr_text": (8, 12, 12),
    **dict.fromkeys(_QWEN3_5, (11, 11, 10)),
    "qwen3_vl": (24, 20, 20),
    "qwen3_vl_moe": (24, 20, 20),
    "hunyuan_vl_text": None,
}
#: Axes that take turns.
_INTERLEAVED = {
    **dict.fromkeys((*_QWEN3_5, "qwen3_vl", "qwen3_vl_moe"), 3),
    "ernie4_5_vl_moe_text": 2,
}


def parse_ropes(
    config: Json, kind: str, head_dim: int, local_head_dim: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read the rotary embeddings of a decoder: that of all layers, or of those with full attention; and that
    of the layers with a window, if they have one of their own (Gemma 3 and 4), of those that don't rotate
    (Cohere 2, EXAONE 4, SmolLM3), or of those without the scaling (Molmo 2).

    Args:
        config: see :func:`parse_rope`.
        head_dim, local_head_dim: numbers per head of the two.

    Raises:
        CheckpointError: naming the field that is missing or not supported.
    """
    if "rope_local_base_freq" not in config and "no_rope_layers" not in config:
        rope = parse_rope(config, kind, head_dim)
        layers = integer(config, "num_hidden_layers")
        if "rope_scaling_layers" not in config or not unscaled_layers(config, layers):
            return rope, None
        if rope.depends_on_length:
            raise _mixed()
        return rope, None if rope.type == "default" else RopeConfig(theta=rope.theta)
    if "no_rope_layers" in config:
        rope = parse_rope(config, kind, head_dim)
        if rope.depends_on_length:
            raise CheckpointError(
                f"config.json: rope type {rope.type!r} is not supported beside layers that don't rotate",
                param=_PARAM,
            )
        return rope, RopeConfig(type="proportional", turning=0)
    stated = config.get("rope_parameters") or {}
    full = {**(stated.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = {"rope_theta": config["rope_local_base_freq"], **(stated.get("sliding_attention") or {})}
    both = [
        parse_rope({**config, "rope_scaling": None, "rope_parameters": parameters}, kind, dim)
        for parameters, dim in ((full, head_dim), (local, local_head_dim))
    ]
    if any(rope.depends_on_length for rope in both):
        raise _mixed()
    return both[0], both[1]


def _mixed() -> CheckpointError:
    return CheckpointError(
        "config.json: rope types whose frequencies depend on a sequence's length are not supported for "
        "models whose layers have different ones. Use yarn or linear",
        param=_PARAM,
    )


def parse_rope(config: Json, kind: str, head_dim: int) -> RopeConfig:
    """Read the rotary embedding of a decoder.

    Args:
        config: the fields of config.json over the defaults of ``kind``; ``rope_theta`` is among them.

    Raises:
        CheckpointError: naming the field that is missing or not supported.
    """
    parameters = _parameters(config)
    name = parameters.get("rope_type", parameters.get("type", "default"))
    name = _ALIASES.get(kind, {}).get(name, name) if isinstance(name, str) else name
    theta = number(parameters if "rope_theta" in parameters else config, "rope_theta")
    if kind in _HUNYUAN and name == "dynamic" and parameters.get("alpha"):
        # The base that NTK-aware scaling by a fixed factor has, for sequences of every length.
        if head_dim < 4:
            raise CheckpointError(
                "config.json: rope type 'dynamic' needs heads of 4 or more", param="head_dim"
            )
        name = "default"
        theta *= number(parameters, "alpha", param=_PARAM) ** (head_dim / (head_dim - 2))
    types = _TYPES.get(kind, _ALL_TYPES)
    if name not in types:
        raise CheckpointError(
            f"config.json: rope type {name!r} is not supported; {', '.join(types)} are", param=_PARAM
        )
    rope_type = cast(RopeType, name)
    positions = integer(config, "max_position_embeddings")
    rotary_dim = _rotary_dim(config, parameters, kind, rope_type, head_dim)
    angles = -(-(rotary_dim or head_dim) // 2)
    rope = RopeConfig(
        theta=theta,
        type=rope_type,
        rotary_dim=rotary_dim,
        mrope_section=_section(parameters, kind, angles) if kind in _SECTIONS else None,
        mrope_interleaved=_INTERLEAVED.get(kind, 0),
        adjacent=kind in _ADJACENT,
        query_growth=_query_growth(config, parameters, positions) if kind == "ministral3" else None,
        **_READERS[rope_type](config, parameters, positions, angles),
    )
    if rope.depends_on_length and rope.mrope_section is not None:
        raise CheckpointError(
            f"config.json: rope type {name!r} is not supported for models with mrope_section: it chooses "
            "frequencies by a sequence's length, which the positions of images and videos don't tell. "
            "Use yarn or linear",
            param=_PARAM,
        )
    return rope


def _query_growth(config: Json, parameters: Json, positions: int) -> tuple[float, int] | None:
    """The growth of queries with their position, in steps of the context before scaling."""
    growth = _optional(parameters, "llama_4_scaling_beta")
    return None if growth is None else (growth, _original(config, parameters, positions))


def stretched_context(rope: RopeConfig, positions: int) -> int:
    """Longest context of a model, in tokens, after rotary scaling.

    Args:
        positions: ``max_position_embeddings`` of config.json. With linear and dynamic scaling this is the
            context before scaling, with yarn it may be either.
    """
    if rope.type in ("linear", "dynamic"):
        return max(positions, int(positions * rope.factor))
    if rope.type == "yarn":
        assert rope.original_max_position is not None
        return max(positions, int(rope.original_max_position * rope.factor))
    return positions


def _parameters(config: Json) -> Json:
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict) or ("layer_types" in config and _LAYER_TYPES & stated.keys()):
        raise CheckpointError(
            "config.json: rope_scaling should have the same parameters for all layers", param=_PARAM
        )
    return stated


def _rotary_dim(config: Json, parameters: Json, kind: str, rope_type: RopeType, head_dim: int) -> int | None:
    """Rotated leading dimensions of a head; None for all.

    Phi-3, Qwen3.5 and GLM alone can rotate a part; some do unless the file states another share.
    The others ignore ``partial_rotary_factor`` without scaling; with scaling Transformers makes tables for a
    part, which their attention can't use.
    """
    field = "partial_rotary_factor"
    partial = kind in _PARTIAL
    if rope_type == "proportional" or (not partial and rope_type == "default"):
        return None
    beside = config.get(field, _SHARES.get(kind, 1.0))
    if beside is None and not partial:
        beside = 1.0
    share = number({field: parameters.get(field, beside)}, field, param=_PARAM)
    dim = int(head_dim * share)
    if dim == head_dim:
        return None
    if not partial or not 0 < dim < head_dim:
        raise CheckpointError(f"config.json: {field} {share} is not supported", param=_PARAM)
    return dim


def _section(parameters: Json, kind: str, angles: int) -> tuple[int, ...]:
    axes: tuple[int, ...] = (3,)
    counts = "three"
    section = parameters.get("mrope_section", _SECTIONS[kind])
    if kind in _HUNYUAN:
        axes, counts = (3, 4), "three or four"
        # Files of the first releases have another name, and perhaps whole numbers with a point.
        section = parameters.get("mrope_section", parameters.get("xdrope_section"))
        if isinstance(section, list) and all(isinstance(size, float) and size % 1 == 0 for size in section):
            section = [int(size) for size in section]
    whole = isinstance(section, list | tuple) and all(isinstance(size, int) for size in section)
    if not whole or len(section) not in axes or min(section) < 0 or sum(section) != angles:
        raise CheckpointError(
            f"config.json: mrope_section should be {counts} numbers with sum {angles}, not {section!r}",
            param=_PARAM,
        )
    if kind != "ernie4_5_vl_moe_text":
        return tuple(section)
    height, width, time = section
    if height != width or not time:
        raise CheckpointError(
            f"config.json: mrope_section {section} should have two equal numbers and one above 0",
            param=_PARAM,
        )
    return time, height, width


def _original(config: Json, parameters: Json, positions: int) -> int:
    """Context before scaling: the field at the top level, else among the parameters, else ``positions``."""
    field = "original_max_position_embeddings"
    return integer({field: positions, **_only(parameters, field), **_only(config, field)}, field, least=2)


def _only(mapping: Json, field: str) -> dict[str, Any]:
    return {field: mapping[field]} if field in mapping else {}


def _default(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    return {}


def _proportional(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    share = number({"partial_rotary_factor": 1.0, **parameters}, "partial_rotary_factor", param=_PARAM)
    if share > 1:
        raise CheckpointError(f"config.json: partial_rotary_factor {share} should be at most 1", param=_PARAM)
    return {
        "factor": number({"factor": 1.0, **parameters}, "factor", param=_PARAM),
        "turning": int(share * 2 * angles // 2),
    }


def _linear(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    return {"factor": number(parameters, "factor", param=_PARAM)}


def _dynamic(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    if angles < 2:
        raise CheckpointError("config.json: rope type 'dynamic' needs heads of 4 or more", param="head_dim")
    return {"factor": number(parameters, "factor", param=_PARAM), "original_max_position": positions}


def _llama3(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    fields = ("factor", "low_freq_factor", "high_freq_factor")
    return {
        **{field: number(parameters, field, param=_PARAM) for field in fields},
        "original_max_position": _original(config, parameters, positions),
    }


def _yarn(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    original = _original(config, parameters, positions)
    factor = _factor(parameters, positions, original, required=True)
    own, beside = _optional(parameters, "mscale"), _optional(parameters, "mscale_all_dim")
    attention = _mscale(factor, 1.0)
    if own and beside:
        attention = _mscale(factor, own) / _mscale(factor, beside)
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": _attention_factor(parameters, attention),
        "beta_fast": _optional(parameters, "beta_fast") or 32.0,
        "beta_slow": _optional(parameters, "beta_slow") or 1.0,
        "truncate": bool(parameters.get("truncate", True)),
    }


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _optional(parameters: Json, field: str) -> float | None:
    """A number that may be missing, null or 0, which all mean the same."""
    return number(parameters, field, param=_PARAM) if parameters.get(field) else None


def _attention_factor(parameters: Json, derived: float) -> float:
    field = "attention_factor"
    return derived if parameters.get(field) is None else number(parameters, field, param=_PARAM)


def _longrope(config: Json, parameters: Json, positions: int, angles: int) -> dict[str, Any]:
    original = _original(config, parameters, positions)
    factor = _factor(parameters, positions, original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "original_max_position": original,
        "attention_factor": _attention_factor(parameters, attention),
        "short_factor": numbers(parameters, "short_factor", angles, param=_PARAM),
        "long_factor": numbers(parameters, "long_factor", angles, param=_PARAM),
    }


def _factor(parameters: Json, positions: int, original: int, *, required: bool = False) -> float:
    """``factor``; null, or missing where it isn't ``required``, stands for the ratio of the two lengths."""
    if parameters.get("factor") is None and not (required and "factor" not in parameters):
        return positions / original
    return number(parameters, "factor", param=_PARAM)


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
