"""OpenTelemetry traces of a request, across client, Serve, the group's actor and storages. Off by default.

    KVCM_TRACING=1 OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 kvcm up ...

On, a process exports its spans by OTLP over HTTP as OpenTelemetry's own ``OTEL_*`` variables say; one that
has a tracer provider already (an engine) uses that. A trace crosses processes as W3C ``traceparent``: in HTTP
headers, gRPC metadata, and beside the requests of an actor call. Off, all of this costs a look at `on`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

log = logging.getLogger(__name__)

VARIABLE = "KVCM_TRACING"
HEADER = "traceparent"
NAME = "kvcm_ray"

#: Whether this process makes spans.
on = os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes")

_incoming: ContextVar[str] = ContextVar("kvcm_traceparent", default="")


def span(name: str, attributes: Mapping[str, Any] | None = None) -> AbstractContextManager[Any]:
    """A span below the present one; entering gives None if there is no tracing."""
    return _span(name, attributes or {}, None, server=False) if on else contextlib.nullcontext()


def accept(traceparent: str) -> None:
    """From here on this task works for the caller with that ``traceparent``."""
    _incoming.set(traceparent)


def served(name: str, attributes: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """The span of a call that came over the network; see `accept`."""
    return _span(name, attributes, _context(_incoming.get()), server=True)


def carried() -> str:
    """``traceparent`` of the present span; "" if there is none."""
    if not on or _tracer() is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return found.get(HEADER, "")


def done(
    names: Sequence[str], traceparents: Sequence[str], began_ns: int, attributes: Sequence[Mapping[str, Any]]
) -> None:
    """Spans of work that was done for several callers at once, from `began_ns` (unix time) until now.
    Those without a ``traceparent`` get none."""
    tracer = _tracer() if on else None
    if tracer is None:
        return
    for name, traceparent, about in zip(names, traceparents, attributes, strict=True):
        if traceparent:
            made = tracer.start_span(
                name, context=_context(traceparent), start_time=began_ns, attributes=dict(about)
            )
            made.end()


@contextlib.contextmanager
def _span(name: str, attributes: Mapping[str, Any], context: Any, *, server: bool) -> Iterator[Any]:
    tracer = _tracer()
    if tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind

    kind = SpanKind.SERVER if server else SpanKind.INTERNAL
    with tracer.start_as_current_span(name, context=context, kind=kind, attributes=dict(attributes)) as made:
        yield made


def _context(traceparent: str) -> Any:
    """The context that a ``traceparent`` tells; an empty one if it is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: traceparent}, Context())


@functools.cache
def _tracer() -> Any:
    """This process's tracer; None, with a line in the log, if what it needs is not installed."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no tracing: %s is not installed; pip install 'kvcm-ray[tracing]'", error.name)
        return None
    known = trace.get_tracer_provider()
    if isinstance(known, TracerProvider):
        return known.get_tracer(NAME)
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "kvcm"}
    provider = TracerProvider(resource=Resource.create({**named, "process.pid": os.getpid()}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer(NAME)
