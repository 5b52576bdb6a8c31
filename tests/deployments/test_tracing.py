"""Spans of all stages, kept in memory."""

import httpx
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import ValidationError

from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from deployments.tracing import Tracer, TracingConfig, current, make_tracer
from engine.errors import InvalidRequest
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import ask, circle, square
from tests.serving import app_args, wait_until

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def in_memory(**options) -> tuple[Tracer, InMemorySpanExporter]:
    provider, kept = TracerProvider(**options), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return Tracer(provider), kept


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def traced():
    tracer, kept = in_memory()
    app = LocalApplication(AppConfig.model_validate(app_args()), tracer)
    async with httpx.AsyncClient(transport=AppTransport(app.api), base_url="http://test", timeout=60) as http:
        yield http, kept
    await wait_until(app.models["pocket"].language_model.is_idle)
    await app.close()


async def spans_of(traced, *, headers=None, **body) -> dict[str, list]:
    """The spans of one chat, by name."""
    http, kept = traced
    kept.clear()
    asked = {"model": "pocket", "max_tokens": 4, "messages": ask("What?", circle("red"), square("blue"))}
    await http.post("/v1/chat/completions", json=asked | body, headers=headers or {})
    found: dict[str, list] = {}
    for span in kept.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_all_stages_add_to_the_caller_s_trace(traced, stream):
    found = await spans_of(traced, headers={"traceparent": CALLER}, stream=stream, ignore_eos=True)
    assert {name: len(spans) for name, spans in found.items()} == {
        "POST /v1/chat/completions": 1,
        "preprocessor": 1,
        "encoder": 2,
        "language_model": 1,
    }
    (request,) = found.pop("POST /v1/chat/completions")
    assert f"{request.context.trace_id:032x}" in CALLER and f"{request.parent.span_id:016x}" in CALLER
    assert request.kind == SpanKind.SERVER and request.attributes["http.response.status_code"] == 200
    for spans in found.values():
        for span in spans:
            assert span.context.trace_id == request.context.trace_id
            assert span.parent.span_id == request.context.span_id
            assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    (made,) = found["language_model"]
    assert [event.name for event in made.events] == ["first token"]
    assert made.attributes["sightline.completion_tokens"] == 4
    assert found["preprocessor"][0].attributes["sightline.items"] == 2


async def test_requests_without_a_trace_get_one_of_their_own(traced):
    traces = set()
    for _ in range(2):
        found = await spans_of(traced)
        (request,) = found["POST /v1/chat/completions"]
        assert request.parent is None
        traces.add(request.context.trace_id)
        assert {span.context.trace_id for spans in found.values() for span in spans} <= traces
    assert len(traces) == 2 and not current.get()


async def test_a_refusal_is_no_error_of_the_server(traced):
    found = await spans_of(traced, logit_bias={"99999": 1})
    assert found["POST /v1/chat/completions"][0].attributes["http.response.status_code"] == 400
    assert {span.status.status_code for spans in found.values() for span in spans} == {StatusCode.UNSET}


async def test_failures_are_marked():
    tracer, kept = in_memory()
    for error in (ZeroDivisionError(), InvalidRequest("no")):
        with pytest.raises(type(error)), tracer.span("work"):
            raise error
    assert [span.status.status_code for span in kept.get_finished_spans()] == [
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]


async def test_a_caller_decides_whether_its_trace_is_kept(traced):
    assert not await spans_of(traced, headers={"traceparent": CALLER[:-1] + "0"})
    tracer, kept = in_memory(sampler=ParentBased(ALWAYS_OFF))
    with tracer.span("work"):
        pass
    assert not kept.get_finished_spans()


def test_spans_go_to_a_collector_if_one_is_configured():
    assert not make_tracer(None, "ingress").on
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    assert make_tracer(TracingConfig(endpoint="http://127.0.0.1:9/v1/traces"), "ingress").on
    with pytest.raises(ValidationError):
        TracingConfig(endpoint="collector:4318")
