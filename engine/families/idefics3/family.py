"""Idefics3 and SmolVLM: a picture in square crops and once as a whole, SigLIP, and a Llama decoder."""

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
from engine.families.parsing.clip import clip_rules
from engine.families.parsing.decoder import (
    checkpoint_dtype,
    eos_ids,
    integer,
    parse_decoder,
    refuse_quantised,
)
from engine.families.parsing.siglip import parse_siglip
from engine.media.image_ops import content_hash, resize
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext

_TOWER_DEFAULTS = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_MARK, _FAKE, _GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
_MAX_EDGE = 4096


class Idefics3Family:
    """Idefics3-8B, SmolVLM and SmolVLM2."""

    name = "idefics3"
    architectures = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw = checkpoint.config
        text = {"rms_norm_eps": 1e-5, **(raw.get("text_config") or {})}
        kind = text.get("model_type", "llama")
        if kind != "llama":
            raise CheckpointError(f"config.json: text model {kind!r} is not supported", param="text_config")
        text["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
        decoder = parse_decoder(text, "llama")
        return ModelConfig(
            architecture=next(name for name in raw["architectures"] if name in self.architectures),
            family=self.name,
            decoder=decoder,
            vision=_vision(raw, checkpoint.preprocessor_config, decoder.hidden_size),
            eos_token_ids=eos_ids(checkpoint, text, vocab_size=decoder.vocab_size),
            dtype=checkpoint_dtype(raw, text),
            bos_token_id=text.get("bos_token_id"),
            image_token_id=raw.get("image_token_id", 128257),
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image=_MARK)

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        crops, rows, columns = item.grid
        text = ""
        for row in range(rows):
            for column in range(columns):
                text += f"{_FAKE}<row_{row + 1}_col_{column + 1}>{_MARK}"
            text += "\n"
        text += f"{_FAKE}{_GLOBAL}{_MARK}{_FAKE}" if not rows else f"\n{_FAKE}{_GLOBAL}{_MARK}{_FAKE}"
        # Tokenised in one piece: two line feeds are one token in some vocabularies and two in others.
        return tuple(
            PlaceholderRun(token, item.num_tokens // crops, True)
            if token == config.image_token_id
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
        return Idefics3Processor.create(checkpoint.preprocessor_config, config, options)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return WeightRules(
            vision=(
                (r"model\.connector\.modality_projection\.(proj\..*)", r"connector.\1"),
                *clip_rules(r"model\.vision_model\."),
            ),
            language=DECODER_RULES,
            ignore=(ROTARY_BUFFERS, r"model\.vision_model\.embeddings\.position_ids", *tied),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.vision.crops import CropVisionEncoder

        return CropVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> CropVisionConfig:
    tower, filled = parse_siglip(raw.get("vision_config") or {}, defaults=_TOWER_DEFAULTS)
    factor = integer({"scale_factor": 2, **raw}, "scale_factor")
    side = filled["image_size"] // filled["patch_size"]
    if side % factor:
        raise CheckpointError(
            f"config.json: scale_factor {factor} does not divide the tower's {side} patches per side",
            param="scale_factor",
        )
    return CropVisionConfig(
        tower=tower,
        image_size=filled["image_size"],
        patch_size=filled["patch_size"],
        keep_class_token=False,
        out_features=hidden,
        mean=tuple(processor.get("image_mean") or (0.5, 0.5, 0.5)),
        std=tuple(processor.get("image_std") or (0.5, 0.5, 0.5)),
        scale=processor.get("rescale_factor", 1 / 255),
        pixel_shuffle=factor,
        bucketed_positions=True,
    )


@dataclass(frozen=True, slots=True)
class Idefics3Processor:
    """See :class:`engine.families.base.MediaProcessor`. Grids are ``(crops, rows, columns)``: the crops row
    by row, then the whole picture as one more; one crop, 0 rows and 0 columns where it isn't split.

    Attributes:
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        longest: what a picture's longer side is resized to first, in pixels.
        split: whether pictures are cut at all.
    """

    side: int
    rows: int
    image_token_id: int
    longest: int
    split: bool = True
    resample: int = 1

    @classmethod
    def create(
        cls, raw: Mapping[str, Any], config: ModelConfig, options: Mapping[str, Any]
    ) -> Idefics3Processor:
        """From preprocessor_config.json with the user's options over it."""
        vision: CropVisionConfig = config.vision
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not raw.get(step, True):
                raise CheckpointError(f"preprocessor_config.json: {step} false is not supported", param=step)
        crop = (raw.get("max_image_size") or {}).get("longest_edge", vision.image_size)
        if crop != vision.image_size:
            raise CheckpointError(
                f"preprocessor_config.json: max_image_size {crop} differs from the tower's "
                f"{vision.image_size} pixels",
                param="max_image_size",
            )
        longest = (raw.get("size") or {}).get("longest_edge", 4 * crop)
        split = raw.get("do_image_splitting", True)
        for name, value in options.items():
            where = f"mm_processor_kwargs.{name}"
            if name == "do_image_splitting" and isinstance(value, bool):
                split = value
            elif name == "size" and _is_edge(value):
                longest = value["longest_edge"]
            elif name in ("do_image_splitting", "size"):
                wanted = "true or false" if name != "size" else f'{{"longest_edge": 1 to {_MAX_EDGE}}}'
                raise ConfigError(
                    f"mm_processor_kwargs: {name} should be {wanted}; got {value!r}", param=where
                )
            else:
                raise ConfigError(
                    f"mm_processor_kwargs: unknown option {name!r}; known are do_image_splitting, size",
                    param=where,
                )
        assert config.image_token_id is not None
        rows = vision.rows_per_crop
        return cls(crop, rows, config.image_token_id, longest, split, raw.get("resample", 1))

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of a picture of ``(width, height)`` pixels."""
        width, height = self._whole_crops(self._bounded(size))
        rows, columns = height // self.side, width // self.side
        return (rows * columns + 1, rows, columns) if self.split and rows * columns > 1 else (1, 0, 0)

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        _, rows, columns = self.grid(image.size)
        whole = resize(image, self._bounded(image.size), self.resample)
        parts = []
        if self.split:
            size = self._whole_crops(whole.shape[1::-1])
            whole = resize(Image.fromarray(whole), size, self.resample)
        if rows:
            cut = whole.reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2)
            parts.append(cut.reshape(-1, self.side, self.side, 3))
        parts.append(resize(Image.fromarray(whole), (self.side, self.side), self.resample)[None])
        pixels = np.concatenate(parts)
        options = {"rows": self.rows}
        key = content_hash(pixels, family="idefics3", options=options, kind="image", size=image.size)
        return PreparedMedia(self._item(key, image.size), pixels)

    @property
    def embedding_field(self) -> str:
        return SIZE_FIELD

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        return self.check(described_size(description))

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        return self._item(key, described_size(description))

    def _item(self, key: str, size: tuple[int, int]) -> MediaItem:
        rows = self.check(size)
        return MediaItem(
            kind="image",
            hash=key,
            num_tokens=rows,
            grid=self.grid(size),
            size=size,
            # Only what takes rows: the tokens around them need the tokenizer.
            placeholder=(PlaceholderRun(self.image_token_id, rows, True),),
        )

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        raise InvalidRequest(
            "this model takes a video as pictures: give its frames as such, with do_image_splitting false",
            param="video",
        )

    def _bounded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The longer side at ``longest`` pixels, the other near the aspect ratio and even."""
        width, height = size
        if width >= height:
            short = int(self.longest / (width / height))
            size = self.longest, max(short + short % 2, 1)
        else:
            short = int(self.longest * (width / height))
            size = max(short + short % 2, 1), self.longest
        return _shrunk(size)

    def _whole_crops(self, size: tuple[int, int]) -> tuple[int, int]:
        """The longer side grown to whole crops, the other with it and then to whole crops as well."""
        width, height = size
        ratio = width / height
        if width >= height:
            width = self._crops(width)
            return width, self._crops(int(width / ratio))
        height = self._crops(height)
        return self._crops(int(height * ratio)), height

    def _crops(self, length: int) -> int:
        return math.ceil(length / self.side) * self.side


def _shrunk(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` with its longer side at most ``_MAX_EDGE``."""
    width, height = size
    ratio = width / height
    if width >= height and width > _MAX_EDGE:
        return _MAX_EDGE, max(int(_MAX_EDGE / ratio), 1)
    if height > width and height > _MAX_EDGE:
        return max(int(_MAX_EDGE * ratio), 1), _MAX_EDGE
    return size


def _is_edge(value: Any) -> bool:
    """Whether ``value`` is ``{"longest_edge": n}`` with an n that pictures can be resized to."""
    if not isinstance(value, Mapping) or value.keys() != {"longest_edge"}:
        return False
    edge = value["longest_edge"]
    return isinstance(edge, int) and not isinstance(edge, bool) and 1 <= edge <= _MAX_EDGE


FAMILY = Idefics3Family()
