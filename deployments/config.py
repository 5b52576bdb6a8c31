"""The arguments in ``serve_config.yaml``: models, their stages, and the ingress."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
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
from deployments.autoscaling import autoscaling_config
from deployments.logs import LoggingConfig
from deployments.references import ReferenceConfig
from deployments.tracing import TracingConfig
from engine.config import EngineConfig
from engine.media.decode import ImageLimits
from engine.media.documents.limits import DocumentLimits
from engine.media.guard import FetchPolicy
from engine.media.ledger import MediaLimits
from engine.media.video.limits import VideoLimits
from engine.parsers.formats import REASONING_TAGS, TOOL_FORMATS

#: Model folders of the configuration are relative to the working directory, or to this one.
PROJECT = Path(__file__).resolve().parent.parent


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StageConfig(_Strict):
    """Replicas, resources and placement of one deployment.

    Attributes:
        num_replicas: replicas, if not autoscaled.
        autoscaling: Ray Serve's ``autoscaling_config``, e.g. ``{min_replicas: 1, max_replicas: 8}``, and
            ``targets`` for the signals of :mod:`deployments.autoscaling`; a ``policy`` of one's own replaces
            that. ``min_replicas: 0`` ends an idle stage; the next request waits for its start.
        num_cpus: CPU cores that each replica reserves; a reservation, not a limit.
        num_gpus: GPUs, or the share of one, that each replica reserves. A replica with 0 sees no GPU.
        resources: further Ray resources by name.
        label_selector: labels that a node must have, e.g. ``{sightline/stage: encode}``; values may be Ray's
            conditions, such as ``in(a, b)`` or ``!a``.
        env: environment variables of the replica's process, e.g. ``OMP_NUM_THREADS`` for work on CPUs.
        max_ongoing_requests: requests that a replica works on at a time; further requests wait outside of it.
        max_queued_requests: calls that may wait for a replica, for each ingress replica; further requests are
            refused with 429. None leaves the limit to the ingress's ``max_active_requests``.
        graceful_shutdown_timeout_s: how long a replica that is asked to stop may finish its requests.
        max_surge_percent: replicas that an update may start before it stops old ones, in percent of their
            number, rounded up. 0 stops old replicas first: for GPUs of which there is no spare one.
            By default 100, or 0 for replicas that reserve a GPU.
        health_check_period_s: how often Ray Serve asks a replica whether it is well. Three failures in a row
            replace it.
        health_check_timeout_s: how long a replica may take to say so.
    """

    #: Its name in :data:`deployments.autoscaling.SIGNALS`.
    stage: ClassVar[str] = "ingress"
    #: Fields that a running replica can take over, see :mod:`deployments.in_place`.
    IN_PLACE: ClassVar[frozenset[str]] = frozenset()

    num_replicas: PositiveInt = 1
    autoscaling: dict[str, Any] | None = None
    num_cpus: NonNegativeFloat = 0.1
    num_gpus: NonNegativeFloat = 0.0
    resources: dict[str, NonNegativeFloat] = {}
    label_selector: dict[str, str] = {}
    env: dict[str, str] = {}
    max_ongoing_requests: PositiveInt = 64
    max_queued_requests: PositiveInt | None = None
    graceful_shutdown_timeout_s: NonNegativeFloat = 20.0
    max_surge_percent: int | None = Field(default=None, ge=0, le=100)
    health_check_period_s: PositiveFloat = 10.0
    health_check_timeout_s: PositiveFloat = 30.0

    @field_validator("num_gpus")
    @classmethod
    def _whole_gpus(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError("a share of a GPU, or a whole number of them")
        return value

    @field_validator("autoscaling")
    @classmethod
    def _autoscaling_is_understood(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            # Imported here: an application in one process has no use for Ray.
            from ray.serve.config import AutoscalingConfig

            if unknown := value.keys() - AutoscalingConfig.model_fields.keys() - {"targets"}:
                raise ValueError(f"Ray Serve's autoscaling_config has no field {sorted(unknown)[0]!r}")
            AutoscalingConfig.model_validate(autoscaling_config(cls.stage, value))
        return value

    @field_validator("label_selector")
    @classmethod
    def _labels_are_understood(cls, value: dict[str, str]) -> dict[str, str]:
        if value:
            from ray._private.label_utils import validate_label_selector

            if fault := validate_label_selector(value):
                raise ValueError(fault)
        return value

    @property
    def surge(self) -> int:
        """``max_surge_percent``, or its default for this stage."""
        if self.max_surge_percent is not None:
            return self.max_surge_percent
        return 0 if self.num_gpus else 100

    def options(self) -> dict[str, Any]:
        """The options of ``serve.deployment``."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.resources:
            actor["resources"] = self.resources
        if self.label_selector:
            actor["label_selector"] = self.label_selector
        if self.env:
            actor["runtime_env"] = {"env_vars": self.env}
        scale = (
            {"num_replicas": self.num_replicas}
            if self.autoscaling is None
            else {"autoscaling_config": autoscaling_config(self.stage, self.autoscaling)}
        )
        return {
            **scale,
            # Not None, so that replicas are told when Serve's configuration no longer has one.
            "user_config": {},
            "ray_actor_options": actor,
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": -1 if self.max_queued_requests is None else self.max_queued_requests,
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "max_surge_percent": self.surge,
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
        }


class PreprocessorConfig(StageConfig):
    """Fetches and prepares images and videos.

    Attributes:
        threads: images that a replica decodes and resizes at a time.
        video_processes: video files that a replica decodes at a time, each in a process of its own.
        document_processes: documents that a replica reads at a time, likewise.
        max_ongoing_requests: as for every stage. Most of them wait for hosts, which costs nothing: images
            that come with their request must not wait for those.
    """

    stage: ClassVar[str] = "preprocessor"
    IN_PLACE: ClassVar[frozenset[str]] = frozenset({"threads"})

    threads: PositiveInt = 4
    video_processes: PositiveInt = 2
    document_processes: PositiveInt = 2
    max_ongoing_requests: PositiveInt = 512


#: How a request's replica is chosen: by what the replicas have seen and their load, or by load alone.
Routing = Literal["content", "load"]


class EncoderConfig(StageConfig):
    """Turns images into embeddings.

    Attributes:
        max_batch_patches: the most patches in one launch, over all images of all requests.
        cache_bytes: memory for embeddings of images seen before.
        duty_cycle: the largest share of the time that a replica computes. Below 1 it rests after each launch,
            so that a language model on the same GPU keeps its pace while images arrive. A launch is never
            interrupted: ``max_batch_patches`` bounds the longest wait.
        routing: ``content`` sends equal items to one replica, so that the caches of all replicas add up.
    """

    stage: ClassVar[str] = "encoder"
    IN_PLACE: ClassVar[frozenset[str]] = frozenset({"max_batch_patches", "cache_bytes", "duty_cycle"})

    max_batch_patches: PositiveInt = 32768
    duty_cycle: float = Field(default=1.0, gt=0, le=1)
    cache_bytes: int = Field(default=512 << 20, ge=0)
    routing: Routing = "content"
    max_ongoing_requests: PositiveInt = 256


class LanguageModelConfig(StageConfig):
    """Generates text. ``max_ongoing_requests`` should not be below the engine's ``max_num_seqs``
    and the number of ingress replicas together: Ray Serve counts the stream of updates to each as a request.

    Attributes:
        routing: ``content`` sends prompts that begin alike to one replica, as far as its load allows.
        hosts: hosts that share one copy of the model, each with as many ranks. They start together, and
            when one is lost all are replaced. Replicas are counted in copies of the model; what a replica
            reserves, each host reserves.
        gpus_per_host: GPUs of each host, in place of ``num_gpus``. The engine's ``tensor_parallel_size``
            follows: ``hosts`` times as many.
    """

    stage: ClassVar[str] = "language_model"

    routing: Routing = "content"
    max_ongoing_requests: PositiveInt = 512
    graceful_shutdown_timeout_s: NonNegativeFloat = 120.0
    hosts: PositiveInt = 1
    gpus_per_host: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _gpus_are_those_of_a_host(cls, values: Any) -> Any:
        gpus = values.get("gpus_per_host") if isinstance(values, dict) else None
        if gpus is None:
            return values
        if values.get("num_gpus", gpus) != gpus:
            raise ValueError(f"num_gpus is {values['num_gpus']}, but gpus_per_host is {gpus}: give only one")
        return {**values, "num_gpus": gpus}

    def options(self) -> dict[str, Any]:
        """See :meth:`StageConfig.options`. Serve counts hosts, not copies of the model."""
        options = super().options()
        if self.hosts == 1:
            return options
        if "num_replicas" in options:
            options["num_replicas"] *= self.hosts
        else:
            assert self.autoscaling is not None
            scale = autoscaling_config(self.stage, self.autoscaling, gang_size=self.hosts)
            scale = {"min_replicas": 1, "max_replicas": 1} | scale
            for name in ("min_replicas", "max_replicas", "initial_replicas"):
                if scale.get(name) is not None:
                    scale[name] *= self.hosts
            if "target_ongoing_requests" in scale:
                # For a policy of one's own: Serve's take the mean over hosts, and the first has all requests.
                scale["target_ongoing_requests"] /= self.hosts
            options["autoscaling_config"] = scale
        spread = {"gang_size": self.hosts, "gang_placement_strategy": "SPREAD"}
        return options | {"gang_scheduling_config": spread}


class ModelSpec(_Strict):
    """One model: its engine, and how each of its stages is deployed.

    Attributes:
        name: the value of ``model`` in clients' requests.
        engine: see :class:`engine.config.EngineConfig`; ``engine.model`` may be relative to the working
            directory or to the project's folder.
        application: the application that has the stages, see :func:`deployments.app.build_stages`. None: this
            one has them. The ingress uses the fields of the model all the same.
        preprocessor, encoder: unused by models without a vision part.
        image_embeds: take embedding rows of images over HTTP, in parts of the type ``image_embeds``. The
            model reads them as they are, so leave it off unless callers are trusted.
        tool_parser: format of the model's tool calls, see :data:`engine.parsers.formats.TOOL_FORMATS`;
            ``auto`` reads it off the chat template, ``none`` leaves calls in the text.
        reasoning_parser: tags of the model's thoughts, see :data:`engine.parsers.formats.REASONING_TAGS`;
            ``auto`` and ``none`` likewise.
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

    @property
    def slug(self) -> str:
        """The name in a form that deployments may carry: it becomes part of file names."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "--", self.name)


def _resolved(path: str | None) -> str | None:
    for base in (Path.cwd(), PROJECT):
        if path and "\n" not in path and "{" not in path and (base / path).exists():
            return str((base / path).resolve())
    return path


class ReplayConfig(_Strict):
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
        max_active_requests: requests that one ingress replica has open at a time; more are refused with 429.
        request_timeout_s: seconds from a request's arrival after which it is ended with an error; None for
            no limit. Ray Serve's own ``request_timeout_s`` would cut streams without a word.
        replay: see :class:`ReplayConfig`.
        health_timeout_s: how long ``/health`` waits for a model's replica.
        threads: prompts that are rendered and tokenized at a time.
        references: media that are kept for later requests which name them by ``uuid``, for all ingress
            replicas together.
        stored_responses: the most responses of ``/v1/responses`` that are kept, for all ingress replicas
            together.
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
            "replay",
            "health_timeout_s",
            "keys",
        }
    )

    max_body_bytes: PositiveInt = 64 << 20
    max_active_requests: PositiveInt = 1024
    request_timeout_s: PositiveFloat | None = None
    replay: ReplayConfig = ReplayConfig()
    health_timeout_s: PositiveFloat = 5.0
    threads: PositiveInt = 4
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
    max_ongoing_requests: PositiveInt = 4096

    @property
    def response_limits(self) -> tuple[int, int, float]:
        """Arguments of :class:`deployments.response_store.KeptResponses`."""
        return self.stored_responses, self.stored_responses_bytes, self.stored_responses_s

    @property
    def has_several_replicas(self) -> bool:
        """There may be more than one ingress replica at a time."""
        return self.num_replicas > 1 or self.autoscaling is not None


class AppConfig(_Strict):
    """The ``args`` of the application.

    Attributes:
        models: at least one, with different names. None is the default: clients name their model.
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
    fetch: FetchPolicy = FetchPolicy()
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
