"""MiniCPM-V 2.6: an overview and slices of each picture, 64 rows for each of them, and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.clip import clip_rules
from engine.families.decoder_json import checkpoint_dtype, eos_ids, integer, parse_decoder, refuse_quantised
from engine.families.siglip import parse_siglip
from engine.families.slicing import fit, slice_grid
from engine.inputs.image_ops import content_hash, resize
from engine.inputs.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.layers.slice_vision_config import SliceVisionConfig, pieces
from engine.weights.rules import ROTARY_BUFFERS, TIED_HEAD, WeightRules

if TYPE_CHECKING:
    from PIL import Image

    from engine.layers.build import BuildContext
    from engine.weights.checkpoint import Checkpoint

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
_BICUBIC = 3
_MAX_SLICES = 64
_MAX_ASPECT_RATIO = 200


class MiniCPMVFamily:
    """MiniCPM-V 2.6. Other versions have the same architecture name, and other parts."""

    name = "minicpm_v"
    architectures = ("MiniCPMV",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw, processor = checkpoint.config, checkpoint.preprocessor_config
        if str(raw.get("version")) != "2.6":
            raise CheckpointError(
                f"config.json: version {raw.get('version')} of MiniCPMV is not supported; 2.6 is",
                param="version",
            )
        decoder = parse_decoder(raw, "qwen2")
        return ModelConfig(
            architecture=self.architectures[0],
            family=self.name,
            decoder=decoder,
            vision=_vision(raw, processor, decoder.hidden_size),
            eos_token_ids=eos_ids(checkpoint, raw, vocab_size=decoder.vocab_size, defaults=(151645, 151643)),
            dtype=checkpoint_dtype(raw),
            bos_token_id=raw.get("bos_token_id"),
            image_token_id=raw.get("image_token_id", 128244),
            extra={"numbered": bool(processor.get("use_image_id", True))},
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image="(<image>./</image>)", template_takes_parts=False, separator="\n")

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        assert config.extra is not None
        _, _, rows, columns, _, _ = item.grid
        text = f"<image_id>{index}</image_id>" if config.extra["numbered"] else ""
        text += f"<image>{_ROW}</image>"
        text += "\n".join([f"<slice>{_ROW}</slice>" * columns] * rows)
        row_token, *rest = encode(_ROW)
        if rest:
            raise CheckpointError(f"the tokenizer has no token {_ROW}, which this model's pictures need")
        return tuple(
            PlaceholderRun(token, config.vision.num_queries, True)
            if token == row_token
            else PlaceholderRun(token, 1, False)
            for token in encode(text)
        )

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return None

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        return MiniCPMVProcessor.create(checkpoint.preprocessor_config, config, options)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return WeightRules(
            vision=((r"(resampler\..*)", r"\1"), *clip_rules(r"vpm\.")),
            language=((r"llm\.(lm_head\..*)", r"\1"), (r"llm\.model\.(.*)", r"\1")),
            ignore=(ROTARY_BUFFERS, r"resampler\.pos_embed", r"vpm\.embeddings\.position_ids", *tied),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.layers.slice_vision import SliceVisionEncoder

        return SliceVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> SliceVisionConfig:
    tower, filled = parse_siglip(raw.get("vision_config") or {}, defaults=_TOWER_DEFAULTS)
    if raw.get("drop_vision_last_layer", True):
        tower = replace(tower, num_layers=tower.num_layers - 1)
    if hidden % _HEAD_DIM:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} is no multiple of {_HEAD_DIM}", param="hidden_size"
        )
    return SliceVisionConfig(
        tower=tower,
        patch_size=filled["patch_size"],
        num_queries=integer({"query_num": 64, **raw}, "query_num"),
        num_heads=hidden // _HEAD_DIM,
        out_features=hidden,
        mean=tuple(processor.get("norm_mean") or (0.5, 0.5, 0.5)),
        std=tuple(processor.get("norm_std") or (0.5, 0.5, 0.5)),
    )


@dataclass(frozen=True, slots=True)
class MiniCPMVProcessor:
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches; grids are described in
    :func:`engine.layers.slice_vision_config.pieces`.

    Attributes:
        resolution: side in pixels of a square that has the area of the overview and of each slice.
        patch: side of a patch in pixels.
        rows: embedding rows for each of them.
        max_slices: most slices of one picture.
    """

    resolution: int
    patch: int
    rows: int
    image_token_id: int
    max_slices: int

    @classmethod
    def create(
        cls, raw: Mapping[str, Any], config: ModelConfig, options: Mapping[str, Any]
    ) -> MiniCPMVProcessor:
        """From preprocessor_config.json with the user's options over it."""
        vision: SliceVisionConfig = config.vision
        wanted = {
            "patch_size": vision.patch_size,
            "image_feature_size": vision.num_queries,
            "slice_mode": True,
        }
        for field, value in wanted.items():
            if raw.get(field, value) != value:
                raise CheckpointError(
                    f"preprocessor_config.json: {field} should be {value}, not {raw[field]!r}", param=field
                )
        max_slices = raw.get("max_slice_nums", 9)
        for name, value in options.items():
            where = f"mm_processor_kwargs.{name}"
            if name != "max_slice_nums":
                raise ConfigError(
                    f"mm_processor_kwargs: unknown option {name!r}; known is max_slice_nums", param=where
                )
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SLICES:
                raise ConfigError(
                    f"mm_processor_kwargs: {name} should be 1 to {_MAX_SLICES}; got {value!r}", param=where
                )
            max_slices = value
        assert config.image_token_id is not None
        resolution = raw.get("scale_resolution", 448)
        return cls(resolution, vision.patch_size, vision.num_queries, config.image_token_id, max_slices)

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The grid of a picture of ``(width, height)`` pixels.

        Raises:
            InvalidRequest: it is too elongated.
        """
        if max(size) > _MAX_ASPECT_RATIO * min(size):
            raise InvalidRequest(
                f"a picture of {size[0]}x{size[1]} pixels is too elongated: the longer side may be at most "
                f"{_MAX_ASPECT_RATIO} times the shorter",
                param="image",
            )
        rows, columns = slice_grid(size, self.resolution, self.max_slices)
        overview = fit(size, self.resolution, self.patch)
        if not rows:
            return (*overview, 0, 0, 0, 0)
        # What one slice has of the picture once its sides are multiples of the grid's, then its own size.
        share = (max(round(size[0] / columns), 1), max(round(size[1] / rows), 1))
        return (*overview, rows, columns, *fit(share, self.resolution, self.patch))

    def check(self, size: tuple[int, int]) -> int:
        return len(pieces(self.grid(size))) * self.rows

    def describe(self, size: tuple[int, int], content: str) -> MediaItem:
        """The item of a picture of ``(width, height)`` pixels that need not be at hand.

        Args:
            content: its hash: of the pixels, or of embedding rows that were made of them.

        Raises:
            InvalidRequest: as :meth:`check`.
        """
        grid = self.grid(size)
        rows = len(pieces(grid)) * self.rows
        # Only what takes rows: the tokens around them need the tokenizer.
        runs = (PlaceholderRun(self.image_token_id, rows, True),)
        return MediaItem("image", content, rows, grid, size, runs)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        height, width, rows, columns, slice_height, slice_width = self.grid(image.size)
        patches = self._cut(image, (height, width), (1, 1))
        if rows:
            slices = self._cut(image, (slice_height, slice_width), (rows, columns))
            patches = np.concatenate([patches, slices])
        content = content_hash(
            patches,
            family="minicpm_v",
            options={"rows": self.rows, "grid": [height, width, rows, columns, slice_height, slice_width]},
            kind="image",
            size=image.size,
        )
        return PreparedMedia(self.describe(image.size, content), patches)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        raise InvalidRequest("this model takes videos as pictures, one for each frame", param="video")

    def _cut(self, image: Image.Image, piece: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
        """The picture resized to ``grid`` (rows and columns) of pieces (in patches), cut into patches."""
        (height, width), (rows, columns), side = piece, grid, self.patch
        pixels = resize(image, (columns * width * side, rows * height * side), _BICUBIC)
        parts = pixels.reshape(rows, height, side, columns, width, side, 3)
        return parts.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side * side)


FAMILY = MiniCPMVFamily()
