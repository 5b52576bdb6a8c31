"""What a model family is: the one place that knows its configuration, pictures, prompts and weights.

A family is a stateless object with the methods of :class:`Family`. Nothing here imports torch: configurations
and media processors are used in processes that never run a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from engine.layers.decoder_config import DecoderConfig
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from engine.checkpoint.folder import Checkpoint
    from engine.checkpoint.rules import WeightRules
    from engine.graphs import Recorder
    from engine.layers.build import BuildContext


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A checkpoint's configuration, in our own terms.

    Attributes:
        architecture: the entry of ``architectures`` in config.json.
        family: name of the family, as the registry knows it.
        decoder: the language model.
        vision: the family's own description of its vision part; None for text-only models.
        eos_token_ids: tokens that end an answer, from generation_config.json, config.json and the family.
        dtype: the checkpoint's own dtype: ``float32``, ``float16`` or ``bfloat16``.
        image_token_id: the token that embedding rows of pictures overwrite.
        video_token_id: the same for videos.
        extra: whatever else a family must remember; plain data.
    """

    architecture: str
    family: str
    decoder: DecoderConfig
    eos_token_ids: tuple[int, ...]
    dtype: str
    vision: Any = None
    bos_token_id: int | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def max_position(self) -> int:
        """Longest context in tokens."""
        return self.decoder.max_position

    @property
    def embedding_width(self) -> int:
        """Numbers per embedding row: the hidden size, followed by one more per deepstack layer."""
        return self.decoder.hidden_size * (1 + self.decoder.num_deepstack)


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How a family's prompts speak of pictures.

    Attributes:
        image: what marks a picture in a rendered prompt, and becomes the item's placeholder. ``{index}`` in
            it stands for the picture's number in the prompt, from 1.
        video: the same for a video; None if the family has none.
        separator: what joins the parts of a message for chat templates that take strings.
        split_at_media: text before, between and after the marks is tokenised piece by piece, each with the
            tokenizer's own special tokens (Phi-3.5-vision), instead of as one text.
        default_template: Jinja chat template to use where the checkpoint brings none; None: there is none.
    """

    image: str | None = None
    video: str | None = None
    separator: str = ""
    split_at_media: bool = False
    default_template: str | None = None


class MediaProcessor(Protocol):
    """Turns decoded pictures into what the encoder takes. CPU only, thread-safe, picklable."""

    def check(self, size: tuple[int, int]) -> int:
        """Embedding rows for a picture of ``(width, height)`` pixels, without looking at it.

        Raises:
            InvalidRequest: if a picture of this size can't be shown to the model.
        """

    def prepare(self, image: Image.Image) -> PreparedMedia:
        """Prepare an upright RGB picture exactly as the checkpoint's own processor does.

        Raises:
            InvalidRequest: as :meth:`check`.
        """

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        """Prepare upright RGB frames of one size as one item of kind ``video``.

        Raises:
            InvalidRequest: if the family has no video, or as :meth:`check`.
        """


@runtime_checkable
class PromptAwareProcessor(Protocol):
    """A :class:`MediaProcessor` that shows a picture otherwise where it is one of several."""

    def among(self, num_images: int) -> MediaProcessor:
        """The processor for each picture of a prompt with ``num_images``, videos not counted."""


@runtime_checkable
class NamelessProcessor(Protocol):
    """A :class:`MediaProcessor` whose items can be named after their encoding was begun: that takes longer
    than the rest of their preparation, and no encoder asks for it."""

    def nameless(self) -> MediaProcessor:
        """The same processor, but its items have no content hash yet (``""``)."""

    def named(self, media: PreparedMedia) -> PreparedMedia:
        """``media`` of :meth:`nameless` as this processor itself would have prepared it."""


@runtime_checkable
class EmbeddingProcessor(Protocol):
    """A :class:`MediaProcessor` whose pictures may also come as embedding rows.

    ``embedding_field`` names what describes each item beside its rows; None if rows say it all.
    """

    embedding_field: str | None

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        """Rows of an item so described.

        Raises:
            InvalidRequest: the description has no meaning.
        """

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        """The item, with ``key`` as its content hash; errors as :meth:`embedding_rows`."""


class MediaEncoder(Protocol):
    """A loaded vision part: pixels to embedding rows, on its device."""

    def cost(self, item: MediaItem) -> int:
        """Patches that the tower attends over for ``item``: the unit in which launches are budgeted."""

    def record(self, record: Recorder) -> None:
        """Record passes through the tower for few pictures, so that none waits for it."""

    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        """Rows ``(num_tokens, embedding_width)`` of each item, in the model's dtype, on the device.

        Raises:
            InvalidRequest: an item's pixels don't have the shape that its grid announces.
        """


class Family(Protocol):
    """One model family. Instances are stateless."""

    name: str
    architectures: tuple[str, ...]

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        """Read the checkpoint's JSON files.

        Raises:
            CheckpointError: naming the field that is missing or not supported.
        """

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        """How prompts mark pictures."""

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        """Token runs that replace the mark of the ``index``-th item (from 0) of a prompt.

        ``item.placeholder`` in most families; ``encode`` tokenises text without special tokens for those that
        write the picture's number into the prompt.
        """

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        """Rotary positions ``(3, num_tokens)`` int64 of a prompt, and what to add to the index of every later
        token to get its position on all three axes; None where positions are plain indices."""

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        """The processor of this checkpoint with the user's ``mm_processor_kwargs``; None for text-only ones.

        Raises:
            ConfigError: naming the option that is unknown or out of bounds.
        """

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        """Which checkpoint tensors belong to which part, and what they are called in it."""

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        """The vision part, with weights allocated but not filled; also a ``torch.nn.Module``."""
