"""The arguments in ``serve_config.yaml``: models and the ingress."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deployments.access import KeyConfig
from deployments.logs import LoggingConfig
from deployments.references import ReferenceConfig
from deployments.stage_config import (
    Count,
    EncoderConfig,
    LanguageModelConfig,
    PreprocessorConfig,
    StageConfig,
    Workers,
)
from deployments.tracing import TracingConfig
from engine.config import EngineConfig
from engine.media.decode import ImageLimits
from engine.media.documents.limits import DocumentLimits
from engine.media.guard import FetchPolicy
from engine.media.ledger import MediaLimits
from engine.media.video.limits import VideoLimits
from engine.parsers.formats import REASONING_TAGS, TOOL_FORMATS
from engine.settings import Settings

#: Model folders of the configuration are relative to the working directory, or to this one.
PROJECT = Path(__file__).resolve().parent.parent

_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#]+")


class ModelSpec(Settings):
    """One model: its engine, and how each of its stages is deployed.

    Attributes:
        name: the value of ``model`` in clients' requests.
        engine: how the model is run. ``engine.model`` may be relative to the working directory or to the
            project's folder.
        application: the application with the stages, of :func:`deployments.app.build_stages`. None: this
            one has them. The ingress uses the fields of the model all the same.
        preprocessor, encoder: their replicas; unused by models without a vision part.
        language_model: its replicas.
        image_embeds: take embedding rows of images over HTTP, in parts of the type ``image_embeds``. The
            model reads them as they are, so leave it off unless callers are trusted.
        tool_parser: format of the model's tool calls, one of :data:`engine.parsers.formats.TOOL_FORMATS`;
            ``auto`` reads it off the chat template, ``none`` leaves calls in the text.
        reasoning_parser: tags of the model's thoughts, one of :data:`engine.parsers.formats.REASONING_TAGS`;
            ``auto`` and ``none`` likewise; ``auto`` also knows families whose templates show no tags.
    """

    name: str = Field(min_length=1, max_length=256)
    engine: EngineConfig
    application: str | None = None
    preprocessor: PreprocessorConfig = PreprocessorConfig()
    encoder: EncoderConfig = EncoderConfig()
    image_embeds: bool = False
    language_model: LanguageModelConfig = LanguageModelConfig()
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"

    @field_validator("tool_parser", "reasoning_parser")
    @classmethod
    def _parser_is_known(cls, value: str, info: ValidationInfo) -> str:
        known: Iterable[str] = TOOL_FORMATS if info.field_name == "tool_parser" else REASONING_TAGS
        if value not in ("auto", "none", *known):
            raise ValueError(f"must be auto, none, or one of {', '.join(known)}")
        return value

    @field_validator("engine")
    @classmethod
    def _absolute(cls, engine: EngineConfig) -> EngineConfig:
        # Replicas run in other folders than the process that reads the configuration.
        names = ("model", "tokenizer", "chat_template", "allowed_local_media_path")
        paths = {name: _resolved(getattr(engine, name)) for name in names}
        return engine.model_copy(update=paths)

    @model_validator(mode="after")
    def _ranks_fill_the_hosts(self) -> Self:
        hosts, gpus = self.language_model.hosts, self.language_model.gpus_per_host
        size = self.engine.tensor_parallel_size
        if gpus is not None and "tensor_parallel_size" not in self.engine.model_fields_set:
            size = hosts * gpus
            object.__setattr__(self, "engine", self.engine.model_copy(update={"tensor_parallel_size": size}))
        if gpus is not None and size != hosts * gpus:
            raise ValueError(f"engine.tensor_parallel_size is {size}, but there are {hosts} x {gpus} GPUs")
        if size % hosts:
            raise ValueError(f"engine.tensor_parallel_size {size} can't be shared evenly by {hosts} hosts")
        return self

    @model_validator(mode="after")
    def _one_host_encodes(self) -> Self:
        if self.encoder.with_language_model and self.language_model.hosts > 1:
            raise ValueError("encoder.with_language_model needs a language model on one host")
        return self

    @property
    def slug(self) -> str:
        """The name in a form that deployments may carry: it becomes part of file names."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "--", self.name)


def _resolved(path: str | None) -> str | None:
    for base in (Path.cwd(), PROJECT):
        if path and "\n" not in path and "{" not in path and (base / path).exists():
            return str((base / path).resolve())
    return path


class ReplayConfig(Settings):
    """Bounds on carrying a request on whose preprocessor, encoder or language model dies.

    Attributes:
        max_losses: losses of one request after which it fails: a request may be what kills its replicas.
        patience_s: seconds after a loss within which work on the request must have begun again, the restart
            of a replica included.
        pause_s: seconds before the second try; each further pause is twice as long, up to 2 seconds. A dead
            process may still be listed for a moment.
    """

    max_losses: NonNegativeInt = 8
    patience_s: PositiveFloat = 120.0
    pause_s: PositiveFloat = 0.05


class IngressConfig(StageConfig):
    """The HTTP side.

    Attributes:
        max_body_bytes: larger request bodies are refused with 413.
        max_active_requests: requests for answers that one ingress replica has open at a time, or works on in
            the background; more are refused with 429.
        request_timeout_s: seconds from a request's arrival after which it is ended with an error; None for
            no limit. Ray Serve's own ``request_timeout_s`` would cut streams without a word.
        send_timeout_s: seconds for which a client may leave what it is sent unread; then the response and its
            connection are ended. None for no limit. Behind Ray Serve's own servers, which take all that is
            sent, it acts only with ``deployments.ray_serve.doorstep`` before them, as behind HAProxy.
        replay: bounds on carrying on requests whose replicas die.
        health_timeout_s: how long ``/health`` and ``/v1/models`` wait for a model's replica.
        threads: prompts that are rendered and tokenized at a time.
        references: media that are kept for later requests which name them by ``uuid``, for all ingress
            replicas together.
        stored_responses: the most responses of ``/v1/responses`` that are kept, for all ingress replicas
            together; with 0 none are made in the background.
        stored_responses_s: seconds for which they are kept.
        stored_responses_bytes: the most bytes of all of them; conversations hold their images.
        keys: who may use the server; everybody if there are none. See :class:`deployments.access.KeyConfig`.
        page: serve a page to chat with the models at ``/``, and one that describes the API at ``/docs``.
        cors_origins: web pages that may use the server from a browser, e.g. ``["http://localhost:3000"]``.
    """

    IN_PLACE: ClassVar[frozenset[str]] = frozenset(
        {
            "max_body_bytes",
            "max_active_requests",
            "request_timeout_s",
            "send_timeout_s",
            "replay",
            "health_timeout_s",
            "keys",
        }
    )

    max_body_bytes: PositiveInt = 64 << 20
    max_active_requests: PositiveInt = 1024
    request_timeout_s: PositiveFloat | None = None
    send_timeout_s: PositiveFloat | None = 60.0
    replay: ReplayConfig = ReplayConfig()
    health_timeout_s: PositiveFloat = 5.0
    threads: Workers = 4
    stored_responses: NonNegativeInt = 1024
    stored_responses_s: PositiveFloat = 3600.0
    references: ReferenceConfig = ReferenceConfig()
    stored_responses_bytes: PositiveInt = 256 << 20
    keys: tuple[KeyConfig, ...] = ()
    page: bool = True
    cors_origins: tuple[str, ...] = ()
    # As the language model's: a stream lasts as long in both.
    graceful_shutdown_timeout_s: NonNegativeFloat = 120.0
    # Above max_active_requests, so that the ingress refuses first: its answer says what happened.
    max_ongoing_requests: Count = 4096

    @field_validator("cors_origins")
    @classmethod
    def _origins_as_browsers_send_them(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin. Write http://localhost:3000, without path or slash, or *."
                )
        return tuple(origin.lower() for origin in value)

    @property
    def response_limits(self) -> tuple[int, int, float]:
        """Arguments of :class:`deployments.response_store.KeptResponses`."""
        return self.stored_responses, self.stored_responses_bytes, self.stored_responses_s

    @property
    def has_several_replicas(self) -> bool:
        """There may be more than one ingress replica at a time."""
        return self.num_replicas > 1 or self.autoscaling is not None


class AppConfig(Settings):
    """The ``args`` of the application.

    Attributes:
        models: at least one, with different names. A request need not name its model where one alone can
            answer.
        ingress: the HTTP side.
        fetch: the addresses that images may come from.
        images: limits on an image's format and size.
        logging: format and level of the logs of all processes.
        videos: limits on videos.
        media: the most that the media of open requests may take together.
        tracing: where spans of OpenTelemetry go; there are none without it. See
            :class:`deployments.tracing.TracingConfig`.
        documents: limits on documents, and on images with several frames.
    """

    models: tuple[ModelSpec, ...]
    ingress: IngressConfig = IngressConfig()
    # Its defaults come from the environment.
    fetch: FetchPolicy = Field(default_factory=FetchPolicy)
    images: ImageLimits = ImageLimits()
    tracing: TracingConfig | None = None
    logging: LoggingConfig = LoggingConfig()
    videos: VideoLimits = VideoLimits()
    documents: DocumentLimits = DocumentLimits()
    media: MediaLimits = MediaLimits()

    @field_validator("models")
    @classmethod
    def _different(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        # min_length in the type would add its error to every other validation error.
        if not models:
            raise ValueError("at least one model")
        seen: dict[str, str] = {}
        for model in models:
            if model.slug in seen:
                raise ValueError(f"the names {seen[model.slug]!r} and {model.name!r} are too alike")
            seen[model.slug] = model.name
        return models
