"""Spans of OpenTelemetry over all stages of a request. Off unless ``tracing`` is configured.

The ingress begins a span for each HTTP request, below the caller's span if the request has the header
``traceparent`` (W3C). Calls of stages carry the span's id along, and each stage adds its span to the trace.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ConfigError
from engine.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

#: The headers ``traceparent`` and ``tracestate`` of a span; empty where nothing is traced.
Carrier = Mapping[str, str]

#: The span that the current work belongs to.
current: ContextVar[Carrier] = ContextVar("current_span", default={})  # noqa: B039

_HEADERS = ("traceparent", "tracestate")


class TracingConfig(Settings):
    """Destination of spans. Needs the extra ``tracing``.

    Attributes:
        endpoint: of a collector that speaks OTLP over HTTP, e.g. ``http://collector:4318/v1/traces``.
        sample_ratio: share of the traces that begin here and are kept. Callers decide for theirs.
    """

    endpoint: str = Field(pattern=r"^https?://")
    sample_ratio: float = Field(default=1.0, ge=0, le=1)


class OpenSpan:
    """A span that has begun, or nothing where nothing is traced."""

    def __init__(self, span: "Span | None" = None) -> None:
        self._span = span

    def note(self, **attributes: str | float) -> None:
        """Set attributes."""
        if self._span is not None:
            self._span.set_attributes({f"sightline.{name}": value for name, value in attributes.items()})

    def event(self, name: str) -> None:
        """Add an event that happens now."""
        if self._span is not None:
            self._span.add_event(name)


_NOTHING = OpenSpan()


class Tracer:
    """Makes spans.

    Args:
        provider: keeps or exports them; None: there are none.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("sightline")

    @property
    def on(self) -> bool:
        """Return whether spans are made."""
        return self._tracer is not None

    @contextmanager
    def span(self, name: str) -> Iterator[OpenSpan]:
        """Trace the block as a part of the :data:`current` work. It may be in a generator: what the block
        calls does not become a part of its span."""
        if self._tracer is None:
            yield _NOTHING
            return
        span = self._begin(name, current.get())
        try:
            yield OpenSpan(span)
        except Exception as error:
            # As in OpenTelemetry's conventions: what the caller has to change is no error of the server.
            if getattr(error, "status", 500) >= 500:
                _mark(span, type(error).__name__)
            raise
        finally:
            span.end()

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` with a span for each HTTP request, to which its stages' spans belong."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            span = self._begin(
                f"{scope['method'][:10]} {scope['path'][:100]}",
                {name: headers[name] for name in _HEADERS if name in headers},
                server=True,
            )

            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        _mark(span, str(message["status"]))
                await send(message)

            token = current.set(_carrier(span))
            try:
                await app(scope, receive, note)
            finally:
                current.reset(token)
                span.end()

        return traced

    def _begin(self, name: str, parent: Carrier, *, server: bool = False) -> "Span":
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert self._tracer is not None
        # An empty context: nothing of this process's own tracing, such as Ray's, gets in between.
        context = TraceContextTextMapPropagator().extract(dict(parent), Context())
        kind = SpanKind.SERVER if server else SpanKind.INTERNAL
        return self._tracer.start_span(name, context, kind)


def make_tracer(config: TracingConfig | None, service: str) -> Tracer:
    """The tracer of a process.

    Args:
        config: None: nothing is traced.
        service: the process's part of the server.

    Raises:
        ConfigError: the packages of the extra ``tracing`` are missing.
    """
    if config is None:
        return Tracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(
            f"tracing needs: pip install 'sightline[tracing]' ({error})", param="tracing"
        ) from error
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
        resource=Resource.create({"service.name": f"sightline-{service}"}),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint)))
    return Tracer(provider)


def _carrier(span: "Span") -> dict[str, str]:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, Any] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier


def _mark(span: "Span", description: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, description))
