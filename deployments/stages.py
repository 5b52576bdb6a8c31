"""The three stages of an answer as the pipeline sees them: preprocessor, encoder, language model.

A stage may run in this process (:mod:`deployments.in_process`) or in replicas of its own
(:mod:`deployments.ray_serve`). Every implementation keeps these promises:

- A refusal or failure is a :class:`~engine.errors.SightlineError`; any other exception is a bug.
- :class:`StageLost` says that the process that did the work has died. The same call may be made again;
  after :class:`RowsLost` with embedding rows that were encoded again.
- Cancelling the task that awaits a stage, or closing its iterator, ends the work and frees what it held.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.metrics.families import Counter, Part
from engine.errors import Unavailable
from engine.mailbox import Taker
from engine.media.source import MediaSource
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.pooling_params import PoolingParams
from engine.preparation import PagedFile
from engine.progress import Progress
from engine.prompt import EngineInput, KeptFiles, MediaItem
from engine.sampling_params import SamplingParams


class StageLost(Unavailable):
    """The process that worked on this request died, and its work with it."""


class RowsLost(StageLost):
    """Pixels or embedding rows of this request are lost with the process that made them."""


@contextmanager
def stopping_is_loss() -> Iterator[None]:
    """Raise :class:`StageLost` where an engine of this process has stopped: another one can do its work."""
    try:
        yield
    except StageLost:
        raise
    except Unavailable as error:
        raise StageLost(error.message) from error


class Pixels(Protocol):
    """A prepared image or video. Its pixels are in this process, or elsewhere behind a reference."""

    @property
    def item(self) -> MediaItem: ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """Durations of the steps of its preparation: ``fetch`` and ``prepare``."""
        ...

    @property
    def frames(self) -> int:
        """Frames of a video that the model is shown; 1 for an image."""
        ...

    @property
    def note(self) -> str:
        """The parts of the image that are missing, in words; empty if none is."""
        ...

    @property
    def kept(self) -> KeptFiles | None:
        """The item's encoded files, if its source has a ``uuid`` and brought them."""
        ...

    @property
    def embedded(self) -> "Rows | None":
        """Embedding rows that the caller gave in place of an image; None if the encoder makes them."""
        ...


#: Embedding rows of one item, in this process or behind a reference; ``cached`` is true if they were computed
#: for an earlier request, and ``kept()`` gives them for several prompts. Made by the encoder stage, and read
#: by the language model stage of the same implementation only.
Rows = Any


@dataclass(frozen=True, slots=True)
class Generation:
    """A request to generate text.

    Attributes:
        request_id: unique.
        inputs: the prompt.
        params: how to sample.
        priority: requests with a smaller number are scheduled first.
        progress: what the caller has of the answer already; the stream brings the rest.
        asked: when the client asked, by ``time.time()``: other hosts have other clocks of the monotonic kind.
    """

    request_id: str
    inputs: EngineInput
    params: SamplingParams
    priority: int = 0
    progress: Progress | None = None
    asked: float | None = None


@dataclass(frozen=True, slots=True)
class Pooling:
    """A request to pool a prompt's hidden states; fields as in :class:`Generation`."""

    request_id: str
    inputs: EngineInput
    params: PoolingParams


class Stage(Protocol):
    """Any of the stages."""

    async def collect(self) -> list[Part]:
        """The metrics of each replica that answers, with its name as the label ``replica``.

        Raises:
            Exception: no replica answers.
        """
        ...


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An opened document or image file, of which pages are shown.

    Attributes:
        pages: their sources and texts.
        file: its bytes, or a reference to them; made and read by the same implementation only.
    """

    pages: PagedFile
    file: KeptFiles


class PreprocessorStage(Stage, Protocol):
    """Fetches, decodes and resizes images. Needs no GPU."""

    async def prepare(
        self,
        sources: Sequence[MediaSource],
        files: Mapping[int, KeptFiles],
        caller: str,
        images: int | None = None,
        salt: str = "",
    ) -> Sequence[Pixels]:
        """Prepare media of a request, in order.

        Args:
            files: files from earlier requests, by the index of the source that names them; made by the
                preprocessor stage of the same implementation.
            caller: name of the caller's API key.
            images: number of images of the whole request; that of ``sources`` if None.
            salt: keeps the caches of tenants apart.

        Raises:
            MediaError: an item can't be fetched, decoded or shown; ``param`` is its ``where``.
            RowsLost: some of ``files`` are lost with the process that held them.
        """
        ...

    async def open(
        self, sources: Sequence[MediaSource], files: Mapping[int, KeptFiles], caller: str, images: int
    ) -> Sequence[OpenFile]:
        """Fetch and open files whose pages are shown; arguments and errors as :meth:`prepare`.

        Args:
            images: number of the request's other images.

        Raises:
            ContextLengthExceeded: the pages need more tokens than the model's context has.
        """
        ...

    async def prepare_pages(
        self, file: OpenFile, pages: Sequence[MediaSource], images: int, salt: str = ""
    ) -> Sequence[Pixels]:
        """Render and prepare pages of a file, in order; errors as :meth:`prepare`.

        Args:
            images: number of images of the whole request.
            salt: as of :meth:`prepare`.
        """
        ...


class EncoderStage(Stage, Protocol):
    """Turns prepared media into embedding rows."""

    async def encode(self, pixels: Any, salt: str, asked: float) -> Rows:
        """Encode one item.

        Args:
            pixels: made by the preprocessor stage of the same implementation.
            salt: keeps the caches of tenants apart.
            asked: as of :class:`Generation`.
        """
        ...


class LanguageModelStage(Stage, Protocol):
    """Runs the language model over prompts and embedding rows."""

    async def max_model_len(self) -> int:
        """The most tokens of prompt and answer together."""
        ...

    async def device(self) -> str:
        """The devices that the model runs on, in words."""
        ...

    def generate(
        self, request: Generation, media: Sequence[Rows], relay: Taker | None = None
    ) -> AsyncGenerator[StreamUpdate, None]:
        """Stream the output; each update holds everything since the last one.

        Args:
            media: embedding rows of the prompt's items, each distinct item once.
            relay: takes updates past this iterator, while that waits for the next one.
        """
        ...

    async def embed(self, request: Pooling, media: Sequence[Rows]) -> EmbeddingOutput:
        """Pool the prompt's hidden states into a vector; ``media`` as in :meth:`generate`."""
        ...


#: What each stage is asked for, in words.
_ASKED = {"preprocessor": "preparations", "encoder": "embedding rows", "language_model": "answers"}


def ways_to(stage: str) -> Counter:
    """Counts requests by the way on which they went to another process."""
    return Counter(
        f"sightline_{stage}_requests_total",
        f"Requests for {_ASKED[stage]} by the way on which they went to a replica.",
        "way",
        known=("line", "call"),
    )


def _no_ways() -> tuple[Counter, ...]:
    return tuple(map(ways_to, _ASKED))


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of one model. A text-only model has neither preprocessor nor encoder.

    Attributes:
        ways: to each of them, see :func:`ways_to`; in one process these counters stay at 0.
    """

    language_model: LanguageModelStage
    preprocessor: PreprocessorStage | None = None
    encoder: EncoderStage | None = None
    ways: Sequence[Counter] = field(default_factory=_no_ways)

    def by_name(self) -> dict[str, Stage]:
        """The stages that the model has."""
        found: dict[str, Stage | None] = {
            "preprocessor": self.preprocessor,
            "encoder": self.encoder,
            "language_model": self.language_model,
        }
        return {name: stage for name, stage in found.items() if stage is not None}
