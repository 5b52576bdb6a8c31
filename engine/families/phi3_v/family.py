"""Phi-3.5-vision, and VLM2Vec built on it: CLIP crops of one size, stitched, and a Phi-3 decoder.

The tower's configuration is not in the public config.json: it is OpenAI's CLIP ViT-L/14 at 336 pixels. An
optional ``vision_config`` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engine.checkpoint.rules import DECODER_RULES, ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.described import SIZE_FIELD, described_size
from engine.families.parsing.clip import clip_rules, parse_clip, unused_clip_tensors
from engine.families.parsing.decoder import checkpoint_dtype, eos_ids, parse_decoder, refuse_quantised
from engine.families.phi3_v.config import HDVisionConfig
from engine.media.image_ops import CLIP_MEAN, CLIP_STD, MAX_ASPECT_RATIO, check_aspect_ratio, content_hash
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext

_VISION = r"model\.vision_embed_tokens\."
_TOWER = _VISION + r"img_processor\.(?:vision_model\.)?"
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_IMAGE_TOKEN = 32044
#: ``<|endoftext|>`` and ``<|end|>`` end answers, though generation_config.json names neither.
_ENDS = (32000, 32007)
_MAX_CROPS = 64


class Phi3VFamily:
    """Phi-3.5-vision-instruct and VLM2Vec-Full."""

    name = "phi3_v"
    architectures = ("Phi3VForCausalLM",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw = checkpoint.config
        decoder = parse_decoder(raw, "phi3")
        vision, layers = _vision(raw, checkpoint.preprocessor_config, decoder.hidden_size)
        return ModelConfig(
            architecture=self.architectures[0],
            family=self.name,
            decoder=decoder,
            vision=vision,
            eos_token_ids=eos_ids(checkpoint, raw, vocab_size=decoder.vocab_size, defaults=_ENDS),
            dtype=checkpoint_dtype(raw),
            bos_token_id=raw.get("bos_token_id"),
            # Its embedding is overwritten; any id of the vocabulary would do.
            image_token_id=min(_IMAGE_TOKEN, decoder.vocab_size - 1),
            extra={"tower_layers": layers},
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image="<|image_{index}|>", separator="\n", split_at_media=True)

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        return item.placeholder

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return None

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        crops = options.get("num_crops", checkpoint.preprocessor_config.get("num_crops", 4))
        if unknown := options.keys() - {"num_crops"}:
            name = min(unknown)
            raise ConfigError(
                f"mm_processor_kwargs: unknown option {name!r}; known is num_crops",
                param=f"mm_processor_kwargs.{name}",
            )
        if not isinstance(crops, int) or isinstance(crops, bool) or not 1 <= crops <= _MAX_CROPS:
            raise ConfigError(
                f"mm_processor_kwargs: num_crops should be an integer from 1 to {_MAX_CROPS}; got {crops!r}",
                param="mm_processor_kwargs.num_crops",
            )
        assert config.image_token_id is not None
        return Phi3VProcessor(config.vision, config.image_token_id, crops)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        assert config.extra is not None
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return WeightRules(
            vision=(
                (_VISION + r"((?:glb|sub)_GN)", r"\1"),
                (_VISION + r"img_projection\.0\.(.*)", r"connector.fc1.\1"),
                (_VISION + r"img_projection\.2\.(.*)", r"connector.fc2.\1"),
                *clip_rules(_TOWER),
            ),
            language=DECODER_RULES,
            ignore=(
                ROTARY_BUFFERS,
                # The decoder's own embedding once more, in some files.
                _VISION + r"wte\.weight",
                *unused_clip_tensors(_TOWER, config.vision.tower, config.extra["tower_layers"]),
                *tied,
            ),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.families.phi3_v.encoder import HDVisionEncoder

        return HDVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> tuple[HDVisionConfig, int]:
    layout = {
        "use_hd_transform": True,
        "with_learnable_separator": True,
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
    }
    stated = raw.get("embd_layer") or {}
    for field, expected in layout.items():
        if stated.get(field, expected) != expected:
            raise CheckpointError(
                f"config.json: embd_layer.{field} {stated[field]!r} is not supported", param="embd_layer"
            )
    described = raw.get("img_processor") or {}
    feature_layer = described.get("layer_idx", -2)
    tower, filled = parse_clip({**_CLIP_L_336, **(raw.get("vision_config") or {})}, feature_layer)
    config = HDVisionConfig(
        tower=tower,
        image_size=filled["image_size"],
        patch_size=filled["patch_size"],
        out_features=hidden,
        mean=tuple(processor.get("image_mean") or CLIP_MEAN),
        std=tuple(processor.get("image_std") or CLIP_STD),
    )
    if config.side % 2:
        raise CheckpointError(
            f"config.json: {config.side} patches per side can't be joined two by two", param="vision_config"
        )
    return config, filled["num_hidden_layers"]


@dataclass(frozen=True, slots=True)
class Phi3VProcessor:
    """A picture becomes a canvas of whole crops, white above and below; see
    :class:`engine.families.base.MediaProcessor`. The crops are cut by the encoder.

    Attributes:
        vision: the tower's configuration.
        image_token_id: what the rows overwrite.
        num_crops: most crops of a picture, the overview not counted.
    """

    vision: HDVisionConfig
    image_token_id: int
    num_crops: int

    def canvas(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(width, height)`` of the scaled picture and of its canvas, for a picture that lies on its longer
        side.

        Raises:
            InvalidRequest: it is too elongated.
        """
        width, height = size
        unit, ratio = self.vision.image_size, width / height
        # A row of all crops must still be a pixel high.
        check_aspect_ratio(size, min(MAX_ASPECT_RATIO, self.num_crops * unit))
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.num_crops:
            columns += 1
        scaled = columns * unit, int(columns * unit / ratio)
        return scaled, (scaled[0], math.ceil(scaled[1] / unit) * unit)

    def check(self, size: tuple[int, int]) -> int:
        return self.vision.num_rows(self._grid(size))

    def prepare(self, image: Image.Image) -> PreparedMedia:
        upright = image.width < image.height
        lying = image.transpose(Image.Transpose.TRANSPOSE) if upright else image
        scaled, full = self.canvas(lying.size)
        picture = Image.new("RGB", full, (255, 255, 255))
        picture.paste(lying.resize(scaled, Image.Resampling.BILINEAR), (0, (full[1] - scaled[1]) // 2))
        if upright:
            picture = picture.transpose(Image.Transpose.TRANSPOSE)
        pixels = np.asarray(picture)
        options = {"unit": self.vision.image_size}
        key = content_hash(pixels, family="phi3_v", options=options, kind="image", size=image.size)
        return PreparedMedia(self._item(key, self._grid(image.size), image.size), pixels)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        raise InvalidRequest("this model takes pictures, not videos; send frames as pictures", param="video")

    @property
    def embedding_field(self) -> str:
        return SIZE_FIELD

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        return self.check(described_size(description))

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        size = described_size(description)
        return self._item(key, self._grid(size), size)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Crops down and across."""
        _, (long, short) = self.canvas((max(size), min(size)))
        down, across = short // self.vision.image_size, long // self.vision.image_size
        return (across, down) if size[0] < size[1] else (down, across)

    def _item(self, key: str, grid: tuple[int, int], size: tuple[int, int]) -> MediaItem:
        rows = self.vision.num_rows(grid)
        return MediaItem(
            kind="image",
            hash=key,
            num_tokens=rows,
            grid=grid,
            size=size,
            placeholder=(PlaceholderRun(self.image_token_id, rows, True),),
        )


FAMILY = Phi3VFamily()
