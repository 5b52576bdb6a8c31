"""Granite-Docling (500M, 2B): pages in tiles; a Granite whose first layers get features of several depths.

The option ``fine_route`` makes four times as many rows of a tile. The checkpoint's density router, which says
after encoding which pages need them, isn't asked: as in Transformers, the caller says so before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.granite_docling.config import TilesVisionConfig
from engine.families.granite_docling.processor import GraniteDoclingProcessor
from engine.families.idefics3.family import IMAGE, WHOLE_TEXT, tiles_text
from engine.families.parsing.fields import Json, flag, integer, layer_list
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.prompt import MediaItem, PlaceholderRun, runs_with_rows
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_TOWER = r"model\.vision_model\."
_CONNECTOR = _TOWER + r"connector\."
_MERGER = _CONNECTOR + r"(coarse|fine)\.deepstack_mergers\.(\d+)\."
_DEFAULTS: dict[str, Any] = {
    "image_size": 512,
    "scale_factor": 4,
    "out_hidden_size": 1024,
    "deepstack_visual_indexes": [3, 7, 10],
    "use_fine_route": True,
}


def _vision(raw: Json, processor: Json, hidden: int) -> TilesVisionConfig:
    stated = {key: value for key, value in (raw.get("vision_config") or {}).items() if value is not None}
    config = {**_DEFAULTS, **stated}
    tower = parse_siglip(config)
    side, square = tower.grid_side, integer(config, "scale_factor")
    fine = flag(config, "use_fine_route")
    if side % square or (fine and square % 2):
        raise CheckpointError(
            f"config.json: scale_factor {square} doesn't suit the tower's {side} patches per side",
            param="scale_factor",
        )
    if integer(config, "out_hidden_size") != hidden or hidden % 4:
        raise CheckpointError(
            f"config.json: out_hidden_size should be the decoder's {hidden}, and that a multiple of 4",
            param="out_hidden_size",
        )
    layers = layer_list(config, "deepstack_visual_indexes")
    if len(set(layers)) != len(layers) or not all(0 <= layer < tower.config.num_layers for layer in layers):
        raise CheckpointError(
            f"config.json: deepstack_visual_indexes {list(layers)} are not different layers of a tower of "
            f"{tower.config.num_layers}",
            param="deepstack_visual_indexes",
        )
    return TilesVisionConfig(
        tower=tower.config,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        square=square,
        fine=fine,
        # Mergers follow the order of the tower's layers.
        deepstack_layers=tuple(sorted(layers)),
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
    )


def _with_deepstack(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Tells the decoder of the features of several depths."""
    decoder = replace(config.decoder, deepstack_layers=tuple(range(len(config.vision.deepstack_layers))))
    return replace(config, decoder=decoder)


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """A page's tiles row by row, each after the name of its place; then the whole, if there are several."""
    crops, rows, columns = item.grid
    text = tiles_text(rows, columns) + (f"\n{WHOLE_TEXT}" if crops > 1 else "")
    # Tokenised as one text: two line feeds may be one token.
    return runs_with_rows(encode(text), config.image_token_id, repeat(item.num_tokens // crops))


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (_CONNECTOR + r"ln_in\.(.*)", r"in_norm.\1"),
            (_CONNECTOR + r"(coarse|fine)\.projection\.(.*)", r"\1.projection.\2"),
            (_MERGER + r"layer_norm\.(.*)", r"\1.deepstack.\2.norm.\3"),
            (_MERGER + r"linear_([12])\.(.*)", r"\1.deepstack.\2.mlp.fc\3.\4"),
            (_CONNECTOR + r"ln_mid\.(.*)", r"mid_norm.\1"),
            (_CONNECTOR + r"mlp_fc2\.(.*)", r"proj.\1"),
            (_CONNECTOR + r"ln_out\.(.*)", r"out_norm.\1"),
            *tower_rules(_TOWER),
        ),
        # Files may hold heads that predict further tokens.
        ignore=(r"model\.density_router\..*", r"mtp\..*", *unused_tensors(_TOWER, config.vision.tower)),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.granite_docling.encoder import TilesEncoder

    return TilesEncoder(config.vision, build)


FAMILY = Family(
    name="granite_docling",
    architectures=("GraniteDoclingForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("granite_docling_text", text_may_tie=False)),
        vision=_vision,
        image_token=token_field("image_token_id", default=100337),
        finish=_with_deepstack,
    ),
    prompt_format=lambda config: PromptFormat(image=IMAGE),
    placeholder=_placeholder,
    processor=GraniteDoclingProcessor.create,
    options=("crop_to_patches", "max_patches", "fine_route"),
    weights=_weights,
    build_encoder=_encoder,
)
