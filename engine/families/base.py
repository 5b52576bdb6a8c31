"""The types that families share with the rest of the engine: configurations, and interfaces of their parts.

Nothing here imports torch: configurations and media processors are used in processes that never run a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from engine.errors import InvalidRequest
from engine.layers.decoder_config import DecoderConfig
from engine.media.video.video import Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from engine.graphs import Capture


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A checkpoint's configuration, in the engine's own terms.

    Attributes:
        architecture: the entry of ``architectures`` in config.json.
        family: the family's name in the registry.
        decoder: the language model.
        vision: the vision part, of a type that the family chooses; None for text-only models.
        eos_token_ids: tokens that end an answer, from generation_config.json, config.json and the family.
        dtype: the checkpoint's own dtype: ``float32``, ``float16`` or ``bfloat16``.
        image_token_id: the token whose embedding is replaced by the embedding rows of images.
        video_token_id: the same for videos.
        extra: further values that the family needs later; plain data.
    """

    architecture: str
    family: str
    decoder: DecoderConfig
    eos_token_ids: tuple[int, ...]
    dtype: str
    vision: Any = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def max_position(self) -> int:
        """Longest context in tokens."""
        return self.decoder.max_position

    @property
    def embedding_width(self) -> int:
        """Numbers per embedding row: the hidden size, and as many again for each deepstack layer."""
        return self.decoder.hidden_size * (1 + len(self.decoder.deepstack_layers))


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The placeholder strings of images and videos in a family's prompts.

    Attributes:
        image: the placeholder string of an image in a rendered prompt. The prompt builder replaces it by the
            item's placeholder tokens. ``{index}`` in it stands for the image's number in the prompt, from 1.
        video: the same for a video; None if the family has no videos.
        video_prefix: text that a prompt gets before a video's placeholder string. It is tokenised with the
            text before it; the rest of a video's text is the family's ``placeholder``.
        video_behind: text that prompts have before a video's placeholder string anyway, where the rows of
            images and videos have the same token; tells a video in token ids from an image.
        video_mark: text in a rendered prompt that the family's ``video_mark_text`` replaces: the n-th one by
            that of the n-th video; empty if there is none.
        separator: joins the parts of a message for chat templates that take strings.
        split_at_media: whether the texts before, between and after placeholder strings are tokenised piece by
            piece, each with the tokenizer's special tokens (Phi-3.5-vision), instead of as one text.
        start: text that a prompt begins with; it is put before one that doesn't.
        adds_special: whether the tokenizer adds its special tokens to texts; else prompts spell them out.
        default_template: Jinja chat template for checkpoints that bring none; None if there is none.
        template: Jinja chat template that is used in place of the checkpoint's own; None to use that.
        thoughts: name of the tags around the thoughts of models whose chat template shows none, a key of
            :data:`engine.parsers.formats.REASONING_TAGS`; None if they have no thoughts.
    """

    image: str | None = None
    video: str | None = None
    video_prefix: str = ""
    video_behind: str = ""
    video_mark: str = ""
    separator: str = ""
    split_at_media: bool = False
    start: str = ""
    adds_special: bool = True
    default_template: str | None = None
    template: str | None = None
    thoughts: str | None = None


class MediaProcessor(Protocol):
    """Turns decoded images into the encoder's input. CPU only, thread-safe, picklable."""

    def check(self, size: tuple[int, int]) -> int:
        """Number of embedding rows of an image of ``(width, height)`` pixels, by its size alone.

        Raises:
            InvalidRequest: the model can't be shown an image of this size.
        """

    def prepare(self, image: Image.Image) -> PreparedMedia:
        """Prepare an upright RGB image exactly as the checkpoint's own processor does.

        Raises:
            InvalidRequest: as :meth:`check`.
        """

    def prepare_video(self, video: Video) -> PreparedMedia:
        """Prepare a video as one item of kind ``video``.

        Raises:
            InvalidRequest: the family has no videos, or as :meth:`check`.
        """


@runtime_checkable
class VideoProcessor(Protocol):
    """A :class:`MediaProcessor` whose model takes videos."""

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        """The frames of a file that the model is shown: ascending indices, as its own processor chooses.

        Raises:
            InvalidRequest: the file can't give what was asked for.
        """

    def check_video(self, size: tuple[int, int], count: int) -> int:
        """Number of embedding rows of ``count`` frames of ``(width, height)`` pixels.

        Raises:
            InvalidRequest: the model can't be shown frames of this size.
        """


@runtime_checkable
class PromptAwareProcessor(Protocol):
    """A :class:`MediaProcessor` that prepares an image differently when the prompt has several."""

    def among(self, num_images: int) -> MediaProcessor:
        """The processor for each image of a prompt with ``num_images`` images; videos don't count."""


@runtime_checkable
class AdjustableProcessor(Protocol):
    """A :class:`MediaProcessor` that can show an image at a lower cost than configured."""

    def with_options(self, options: Mapping[str, Any]) -> MediaProcessor:
        """The processor with a request's ``mm_processor_kwargs``.

        Raises:
            InvalidRequest: an option is unknown, or would cost more than the configured value.
        """

    def low_detail(self) -> MediaProcessor:
        """The processor for images whose caller asks for ``detail: low``."""


@runtime_checkable
class NamelessProcessor(Protocol):
    """A :class:`MediaProcessor` that can leave out the content hash and add it later.

    Hashing is the slowest part of the preparation and the encoder doesn't need the hash, so encoding may
    start before it.
    """

    def nameless(self) -> MediaProcessor:
        """Return this processor with an empty content hash (``""``) in its items."""

    def named(self, media: PreparedMedia) -> PreparedMedia:
        """``media``, prepared by :meth:`nameless`, with its content hash."""


@dataclass(frozen=True, slots=True)
class EmbeddingField:
    """The numbers that describe each item whose embedding rows come from the caller.

    Attributes:
        name: the entry of ``multi_modal_data["image"]`` that holds them, e.g. ``image_grid_thw``.
        numbers: their names in order, e.g. ``("t", "h", "w")``.
    """

    name: str
    numbers: tuple[str, ...]


IMAGE_SIZES = EmbeddingField("image_size_list", ("width", "height"))
"""For families in which the size of an image decides how many rows it has."""


class SizedProcessor(Protocol):
    """A :class:`MediaProcessor` that knows an image's grid by its size in pixels, ``(width, height)``."""

    @property
    def image_token_id(self) -> int: ...

    def check(self, size: tuple[int, int]) -> int: ...

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]: ...


def sized_item(processor: SizedProcessor, description: tuple[int, ...], key: str) -> MediaItem:
    """The item of an image of ``(width, height)`` pixels, for :meth:`EmbeddingProcessor.embedding_item`.

    Its placeholder lacks the tokens around the rows: they need the tokenizer.
    """
    width, height = description
    size = width, height
    rows, grid = processor.check(size), processor.grid(size)
    return MediaItem.of_rows("image", key, processor.image_token_id, rows, grid=grid, size=size)


class SizedImages:
    """The part of a processor whose images may come as embedding rows with their sizes in pixels."""

    __slots__ = ()

    @property
    def embedding_field(self) -> EmbeddingField | None:
        return IMAGE_SIZES

    def embedding_item(self: SizedProcessor, description: tuple[int, ...], key: str) -> MediaItem:
        return sized_item(self, description, key)


class ImagesOnly:
    """The part of a processor whose model takes no videos."""

    __slots__ = ()

    def prepare_video(self, video: Video) -> PreparedMedia:
        raise InvalidRequest(
            "this model takes images, not videos: send a video's frames as images", param="video"
        )


class SquareImages(ImagesOnly):
    """The part of a processor whose model is shown every image as a square of one size, and takes no videos.

    Attributes:
        side: of the square, in pixels.
        rows: embedding rows per image.
        image_token_id: the token that rows replace.
    """

    __slots__ = ()
    side: int
    rows: int
    image_token_id: int

    @property
    def embedding_field(self) -> None:
        return None

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        return self._item(key, (self.side, self.side))

    def _item(self, key: str, size: tuple[int, int]) -> MediaItem:
        return MediaItem.of_rows("image", key, self.image_token_id, self.rows, grid=(1,), size=size)


@runtime_checkable
class EmbeddingProcessor(Protocol):
    """A :class:`MediaProcessor` whose images may also come as embedding rows."""

    @property
    def embedding_field(self) -> EmbeddingField | None:
        """The description that each item needs beside its rows; None if it needs none."""

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        """The item of a description.

        Args:
            description: the positive numbers of ``embedding_field``; empty if that is None.
            key: the item's content hash.

        Raises:
            InvalidRequest: no image has this description.
        """


class MediaEncoder(Protocol):
    """A loaded vision part: computes embedding rows from pixels, on its device."""

    def cost(self, item: MediaItem) -> int:
        """Number of patches that the tower attends over for ``item``: the unit of launch budgets."""

    def capture_graphs(self, capture: Capture) -> None:
        """Capture the tower's forward pass for small batches, whose kernel launches take the host longer than
        the device computes."""

    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        """Rows ``(num_tokens, embedding_width)`` of each item, in the model's dtype, on the device.

        Raises:
            InvalidRequest: an item's pixels don't have the shape that its grid announces.
        """
