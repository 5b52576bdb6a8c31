"""The configuration of Molmo 2's encoder, and the geometry of its crops. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, flag, integer, number, vision_activation
from engine.families.parsing.processor import parse_normalisation, require_same_colours
from engine.families.parsing.tower import feature_states
from engine.vision.normalisation import HALF_NORMALISATION, Normalisation
from engine.vision.transformer_config import VisionConfig

_VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 25,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "image_size": [378, 378],
    "patch_size": 14,
    "num_channels": 3,
    "attention_bias": True,
}
_ADAPTER: dict[str, Any] = {
    "vision_feature_layer": [24, 18],
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "attention_bias": True,
    "hidden_act": "silu",
    "intermediate_size": 18944,
    "mlp_bias": False,
}
#: Names that public files have for fields of these.
_ALIASES = {
    "image_default_input_size": "image_size",
    "image_patch_size": "patch_size",
    "image_num_pos": "num_position_embeddings",
    "vit_layers": "vision_feature_layer",
}
_FILE, _VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part behind the tower: each window of patches becomes a row, by attention of its mean to itself.

    Attributes:
        hidden_size: width of the attention.
        num_heads: of the attention.
        bias: whether its projections have biases.
        intermediate_size: of the gated MLP behind it.
        activation: of that, by its Hugging Face name.
        mlp_bias: whether its first projections have biases.
    """

    hidden_size: int
    num_heads: int
    bias: bool
    intermediate_size: int
    activation: str
    mlp_bias: bool


@dataclass(frozen=True, slots=True)
class MolmoVisionConfig:
    """A tower for square crops that overlap, and the adapter behind it.

    A crop's margins are what it shares with its neighbours. Of each patch that several crops have, the
    features of one count. The grid of an image is ``(rows, columns)`` of crops; before these the image is
    shown as a whole. Frames of a video are shown as a whole each; the grid of a video is ``(frames,)``.

    Attributes:
        tower: the transformer.
        patch_size: side of a patch in pixels.
        side: of a crop, in patches.
        margins: of a crop at its left or upper and at its right or lower side, in patches.
        window: height and width, in patches, of what becomes a row of an image.
        frame_window: the same of a frame.
        adapter: see there.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    patch_size: int
    side: int
    margins: tuple[int, int]
    window: tuple[int, int]
    adapter: AdapterConfig
    out_features: int
    normalisation: Normalisation
    frame_window: tuple[int, int] = (3, 3)

    @property
    def step(self) -> int:
        """Patches from one crop to the next."""
        return self.side - sum(self.margins)

    def canvas(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Height and width, in patches, of what the crops of ``grid`` show together."""
        rows, columns = grid
        return rows * self.step + sum(self.margins), columns * self.step + sum(self.margins)

    def shapes(self, grid: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Rows as lines and columns: those of the whole image and those of its crops, or of each frame."""
        whole = self.side, self.side
        if len(grid) == 1:
            return (_shape(whole, self.frame_window),) * grid[0]
        return _shape(whole, self.window), _shape(self.canvas(grid), self.window)

    def rows(self, grid: tuple[int, ...]) -> int:
        """Embedding rows of an image or video with ``grid``."""
        return sum(height * width for height, width in self.shapes(grid))

    def squares(self, grid: tuple[int, ...]) -> int:
        """The whole image and all crops, or frames."""
        return grid[0] if len(grid) == 1 else 1 + grid[0] * grid[1]

    def num_patches(self, grid: tuple[int, ...]) -> int:
        """Patches of all squares."""
        return self.squares(grid) * self.side**2

    def windows(self, grid: tuple[int, ...]) -> np.ndarray:
        """The patches of each row, int64 ``(rows, window)``; -1 stands where a window has none."""
        whole = np.arange(self.side**2).reshape(self.side, self.side)
        if len(grid) == 1:
            first = np.arange(grid[0])[:, None, None] * self.side**2
            windows = _cut(whole, self.frame_window)
            return np.where(windows < 0, -1, windows + first).reshape(-1, windows.shape[1])
        height, width = self.canvas(grid)
        (down, lines), (along, columns) = self._owners(height, grid[0]), self._owners(width, grid[1])
        crop = 1 + down[:, None] * grid[1] + along
        canvas = crop * self.side**2 + lines[:, None] * self.side + columns
        return np.concatenate([_cut(whole, self.window), _cut(canvas, self.window)])

    def _owners(self, length: int, crops: int) -> tuple[np.ndarray, np.ndarray]:
        """For each patch along an axis of the canvas: the crop whose features count, and its place there."""
        place = np.arange(length)
        crop = ((place - self.margins[0]) // self.step).clip(0, crops - 1)
        return crop, place - crop * self.step


def _shape(patches: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of the windows that hold ``patches``, height and width."""
    return -(-patches[0] // window[0]), -(-patches[1] // window[1])


def _cut(patches: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """Windows of ``patches (height, width)``, which are first filled up with -1 on all sides, the lower right
    ones if their number is odd."""
    missing = [-length % size for length, size in zip(patches.shape, window, strict=True)]
    filled = np.pad(patches, [(each // 2, each - each // 2) for each in missing], constant_values=-1)
    high, wide = window
    parts = filled.reshape(filled.shape[0] // high, high, filled.shape[1] // wide, wide)
    return parts.swapaxes(1, 2).reshape(-1, high * wide)


def parse_vision(raw: Json, processor: Json, hidden: int) -> MolmoVisionConfig:
    """The vision part of config.json (``raw``), with the crops of the image processor's JSON.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    stated = raw.get("vision_config") or raw.get("vit_config") or {}
    vision, adapter = _filled(_VISION, stated), _filled(_ADAPTER, raw.get("adapter_config") or {})
    patch, layers = integer(vision, "patch_size"), integer(vision, "num_hidden_layers")
    side = _square(vision["image_size"], "config.json: image_size") // patch
    if integer(vision, "num_channels") != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    if vision.get("num_position_embeddings", side**2) not in (None, side**2):
        raise CheckpointError(
            f"config.json: num_position_embeddings should be {side**2}, as many as a crop has patches",
            param="vision_config",
        )
    indices = [
        index + (index >= 0) if isinstance(index, int) else index for index in adapter["vision_feature_layer"]
    ]
    last, features = feature_states(indices, layers)
    width, heads = _heads(vision, "vision_config")
    tower = VisionConfig(
        hidden_size=width,
        intermediate_size=integer(vision, "intermediate_size"),
        num_layers=last,
        stored_layers=layers,
        num_heads=heads,
        patch_dim=3 * patch * patch,
        patch_bias=True,
        bias=flag(vision, "attention_bias"),
        activation=vision_activation(vision["hidden_act"]),
        norm_eps=number(vision, "layer_norm_eps"),
        num_positions=side**2,
        features=features,
    )
    _require_square(processor, _FILE, side, patch)
    margins = _pair(processor, "overlap_margins", [4, 4], least=0)
    if sum(margins) >= side:
        raise CheckpointError(f"{_FILE}: overlap_margins leave nothing of a crop", param="overlap_margins")
    width, heads = _heads(adapter, "adapter_config")
    return MolmoVisionConfig(
        tower=tower,
        patch_size=patch,
        side=side,
        margins=margins,
        window=_pair(processor, "pooling_size", [2, 2], least=1),
        adapter=AdapterConfig(
            width,
            heads,
            flag(adapter, "attention_bias"),
            integer(adapter, "intermediate_size"),
            vision_activation(adapter["hidden_act"]),
            flag(adapter, "mlp_bias"),
        ),
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
    )


def with_frames(vision: MolmoVisionConfig, processor: Json) -> MolmoVisionConfig:
    """``vision`` with the windows of the video processor's JSON.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    _require_square(processor, _VIDEO_FILE, vision.side, vision.patch_size)
    require_same_colours(processor, vision.normalisation, HALF_NORMALISATION)
    return replace(vision, frame_window=_pair(processor, "pooling_size", [3, 3], least=1, file=_VIDEO_FILE))


def _require_square(processor: Json, file: str, side: int, patch: int) -> None:
    size = processor.get("size") or {"height": 378, "width": 378}
    crop = _square(
        [size.get("height"), size.get("width")] if isinstance(size, dict) else size, f"{file}: size"
    )
    if crop != side * patch or processor.get("patch_size", 14) != patch:
        raise CheckpointError(
            f"{file}: size and patch_size should be the tower's {side * patch} and {patch}", param="size"
        )


def _filled(defaults: Json, stated: Json) -> dict[str, Any]:
    named = {_ALIASES.get(field, field): value for field, value in stated.items()}
    return {**defaults, **{field: value for field, value in named.items() if value is not None}}


def _heads(part: Json, field: str) -> tuple[int, int]:
    """Width and heads of an attention whose heads fill the width, and which has as many KV heads."""
    width, heads = integer(part, "hidden_size"), integer(part, "num_attention_heads")
    if part["num_key_value_heads"] != heads or heads * integer(part, "head_dim") != width:
        raise CheckpointError(
            f"config.json: {field} should have as many KV heads as heads, which fill its hidden_size",
            param=field,
        )
    return width, heads


def _square(stated: Any, field: str) -> int:
    if not isinstance(stated, list | tuple) or len(stated) != 2 or stated[0] != stated[1]:
        raise CheckpointError(f"{field} should be two equal sides, not {stated!r}", param="size")
    return int(stated[0])


def _pair(
    processor: Json, field: str, default: list[int], *, least: int, file: str = _FILE
) -> tuple[int, int]:
    stated: Any = processor.get(field, default)
    whole = (
        isinstance(stated, list | tuple) and len(stated) == 2 and all(type(each) is int for each in stated)
    )
    if not whole or min(stated) < least:
        raise CheckpointError(f"{file}: {field} should be two numbers, not {stated!r}", param=field)
    return stated[0], stated[1]
