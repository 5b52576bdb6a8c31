"""Replicas, resources and options of each stage, a part of the arguments in ``serve_config.yaml``."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from deployments.autoscaling import autoscaling_config
from engine.settings import Settings

#: Ray Serve keeps counts in 32 bits.
Count = Annotated[int, Field(gt=0, lt=1 << 31)]
#: Of threads and processes, which are many where there are thousands.
Workers = Annotated[int, Field(gt=0, le=4096)]
#: Of a resource.
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StageConfig(Settings):
    """Replicas, resources and placement of one deployment.

    Attributes:
        num_replicas: replicas, if not autoscaled.
        autoscaling: Ray Serve's ``autoscaling_config``, e.g. ``{min_replicas: 1, max_replicas: 8}``, and
            ``targets`` for what a replica should have to do: ``megapixels``, ``visual_tokens``, ``kv_usage``
            and ``waiting_tokens``, or ``requests``, see :data:`deployments.autoscaling.SIGNALS`; a ``policy``
            of one's own replaces that. ``min_replicas: 0`` ends an idle stage; the next request waits for its
            start.
        num_cpus: CPU cores that each replica reserves; a reservation, not a limit.
        num_gpus: GPUs, or the share of one, that each replica reserves. A replica with 0 sees no GPU.
        resources: further Ray resources by name.
        label_selector: labels that a node must have, e.g. ``{sightline/stage: encode}``; values may be Ray's
            conditions, such as ``in(a, b)`` or ``!a``.
        env: environment variables of the replica's process, e.g. ``OMP_NUM_THREADS`` for work on CPUs.
        max_ongoing_requests: requests that a replica works on at a time; further requests wait outside of it,
            and ask it again and again.
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

    num_replicas: Count = 1
    autoscaling: dict[str, Any] | None = None
    num_cpus: Amount = 0.1
    num_gpus: Amount = 0.0
    resources: dict[str, Amount] = Field(default_factory=dict)
    label_selector: dict[str, str] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    max_ongoing_requests: Count = 64
    max_queued_requests: Count | None = None
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
            try:
                AutoscalingConfig.model_validate(autoscaling_config(cls.stage, value))
            except (ImportError, AttributeError) as error:
                raise ValueError(f"the policy can't be had: {error}") from None
        return value

    @field_validator("resources")
    @classmethod
    def _resources_are_further_ones(cls, value: dict[str, float]) -> dict[str, float]:
        for name, field in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            if name in value:
                raise ValueError(f"say {field} instead of {name}")
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
        threads: images that a replica decodes and resizes at a time. One that is alone is resized by several
            of them if it is large.
        video_processes: video files that a replica decodes at a time, each in a process of its own.
        document_processes: documents that a replica reads at a time, likewise.
        cache_bytes: memory for prepared images, videos and pages, which are not prepared again when a request
            shows them once more; 0 keeps none.
        max_ongoing_requests: as for every stage. Most of them wait for hosts, which costs nothing: images
            that come with their request must not wait for those. Calls by lines are not calls of Ray Serve:
            each ingress replica makes that many at most.
    """

    stage: ClassVar[str] = "preprocessor"
    IN_PLACE: ClassVar[frozenset[str]] = frozenset({"threads", "cache_bytes"})

    threads: Workers = 4
    video_processes: Workers = 2
    document_processes: Workers = 2
    cache_bytes: int = Field(default=256 << 20, ge=0)
    max_ongoing_requests: Count = 512


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
        with_language_model: encode in the replicas of the language model, on their GPUs, instead of in
            replicas of its own. Steps of the language model come between the pieces of a launch, so running
            answers keep their pace. Replicas and resources of this stage, and ``routing``, are then unused.
    """

    stage: ClassVar[str] = "encoder"
    IN_PLACE: ClassVar[frozenset[str]] = frozenset({"max_batch_patches", "cache_bytes", "duty_cycle"})

    max_batch_patches: PositiveInt = 32768
    duty_cycle: float = Field(default=1.0, gt=0, le=1)
    cache_bytes: int = Field(default=512 << 20, ge=0)
    routing: Routing = "content"
    with_language_model: bool = False
    max_ongoing_requests: Count = 1024


class LanguageModelConfig(StageConfig):
    """Generates text.

    ``max_ongoing_requests`` is far above the engine's ``max_num_seqs``. A replica refuses a call beyond it
    only when it has read the call, embeddings included, and gets it again a moment later: a crowd of such
    calls takes a replica's time. A request that waits in the engine takes none. Requests that come by lines
    are not calls of Ray Serve: each ingress replica sends that many at most.

    Attributes:
        routing: ``content`` sends prompts that begin alike to one replica, as far as its load allows.
        hosts: hosts that share one copy of the model, each with as many ranks. They start together, and
            when one is lost all are replaced. Replicas are counted in copies of the model; what a replica
            reserves, each host reserves.
        gpus_per_host: GPUs of each host, in place of ``num_gpus``. The engine's ``tensor_parallel_size``
            follows: ``hosts`` times as many.
        engine_process: run the engine in a process of its own beside the replica's, so that neither waits
            for the other's interpreter. A language model that is spread over hosts has none.
    """

    stage: ClassVar[str] = "language_model"

    routing: Routing = "content"
    max_ongoing_requests: Count = 4096
    graceful_shutdown_timeout_s: NonNegativeFloat = 120.0
    hosts: Count = 1
    gpus_per_host: PositiveInt | None = None
    engine_process: bool = True

    @model_validator(mode="after")
    def _gpus_are_those_of_a_host(self) -> Self:
        gpus = self.gpus_per_host
        if gpus is None:
            return self
        if "num_gpus" in self.model_fields_set and self.num_gpus != gpus:
            raise ValueError(f"num_gpus is {self.num_gpus:g}, but gpus_per_host is {gpus}: give only one")
        object.__setattr__(self, "num_gpus", float(gpus))
        return self

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
