"""MiniCPM-V 2.6, 4.0 and 4.5: an overview and slices of each image, 64 rows for each of them.

The versions have one architecture name. These three differ in their decoder: Qwen2, Llama and Qwen3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.minicpm_v.config import SliceVisionConfig
from engine.families.minicpm_v.processor import MiniCPMVProcessor
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import ConfigReader, token_field
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.prompt import MediaItem, PlaceholderRun, runs_with_rows
from engine.vision.normalisation import HALF_NORMALISATION, Normalisation

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_TOWER = r"vpm\."
_TOWER_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
_HEAD_DIM = 128  # of the resampler
_ROW = "<unk>"
_ROW_ID = 128244  # in version 2.6
#: The decoder, and the tokens that end its answers, by version.
_VERSIONS: dict[str, tuple[DecoderKind, tuple[str, ...]]] = {
    "2.6": ("qwen2", ("<|im_end|>", "<|endoftext|>")),
    "4.0": ("llama", ("<|im_end|>", "</s>")),
    "4.5": ("qwen3", ("<|im_end|>", "<|endoftext|>")),
}
#: Why other versions are refused.
_OTHERS = {
    "None": "it is 2.0 or 2.5 if config.json has no version",
    "2.0": "its tower and its decoder are of other kinds",
    "2.5": "an image's features depend on the images beside it",
}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    version = _version(raw)
    if version not in _VERSIONS:
        reason = f" ({_OTHERS[version]})" if version in _OTHERS else ""
        raise CheckpointError(
            f"config.json: version {version} of MiniCPMV is not supported{reason}; "
            f"{', '.join(_VERSIONS)} are",
            param="version",
        )
    return raw, _VERSIONS[version][0]


def _version(raw: Json) -> str:
    stated = raw.get("version")
    return f"{stated:.1f}" if isinstance(stated, int | float) else str(stated)


def _vision(raw: Json, processor: Json, hidden: int) -> SliceVisionConfig:
    tower = parse_siglip(raw.get("vision_config") or {}, defaults=_TOWER_DEFAULTS)
    config = tower.config
    if raw.get("drop_vision_last_layer", True):
        config = replace(config, num_layers=config.num_layers - 1, stored_layers=config.num_layers - 1)
    if hidden % _HEAD_DIM:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} should be a multiple of {_HEAD_DIM}", param="hidden_size"
        )
    return SliceVisionConfig(
        tower=config,
        patch_size=tower.patch_size,
        num_queries=integer({"query_num": 64, **raw}, "query_num"),
        num_heads=hidden // _HEAD_DIM,
        out_features=hidden,
        normalisation=Normalisation(
            mean=tuple(processor.get("norm_mean") or HALF_NORMALISATION.mean),
            std=tuple(processor.get("norm_std") or HALF_NORMALISATION.std),
        ),
    )


def _with_tokens(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Adds the ids of the version's tokens, and whether prompts give each image its number."""
    ids = checkpoint.added_tokens
    ends = [ids[name] for name in _VERSIONS[_version(checkpoint.config)][1] if name in ids]
    return replace(
        config,
        eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *ends])),
        image_token_id=token_field("image_token_id", default=ids.get(_ROW, _ROW_ID))(
            checkpoint.config, config.decoder
        ),
        extra={"numbered": bool(checkpoint.preprocessor_config.get("use_image_id", True))},
    )


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The image's number, the overview, and the slices row by row."""
    assert config.extra is not None
    _, _, rows, columns, _, _ = item.grid
    text = f"<image_id>{index}</image_id>" if config.extra["numbered"] else ""
    text += f"<image>{_ROW}</image>"
    text += "\n".join([f"<slice>{_ROW}</slice>" * columns] * rows)
    row_token, *rest = encode(_ROW)
    if rest:
        raise CheckpointError(f"the tokenizer has no token {_ROW}, which this model's images need")
    return runs_with_rows(encode(text), row_token, repeat(config.vision.num_queries))


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=((r"(resampler\..*)", r"\1"), *tower_rules(_TOWER)),
        language=((r"llm\.(lm_head\..*)", r"\1"), (r"llm\.model\.(.*)", r"\1")),
        ignore=(r"resampler\.pos_embed", *unused_tensors(_TOWER, config.vision.tower)),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.minicpm_v.encoder import SliceVisionEncoder

    return SliceVisionEncoder(config.vision, build)


FAMILY = Family(
    name="minicpm_v",
    architectures=("MiniCPMV",),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        finish=_with_tokens,
    ),
    prompt_format=lambda config: PromptFormat(image="(<image>./</image>)", separator="\n"),
    placeholder=_placeholder,
    processor=MiniCPMVProcessor.create,
    options=("max_slice_nums",),
    weights=_weights,
    build_encoder=_encoder,
)
