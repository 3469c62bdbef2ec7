"""Traces by OpenTelemetry: what of a run took how long, at the server and at its sites.

They are on where the environment names a collector (OTEL_EXPORTER_OTLP_ENDPOINT) and the extra `trace` is
installed; else nothing is imported, and nothing is sent. A span begins and ends in different threads and
machines, so its parent is always named: by a W3C traceparent, which travels in messages.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

log = logging.getLogger("coterie")


class Span:
    """A stretch of work, from `begin` to `end`. context: what names it as a parent, "" where it is none."""

    def __init__(self, real: Any = None) -> None:
        self.context, self._real = "", real
        if real is not None:
            mine = real.get_span_context()
            self.context = f"00-{mine.trace_id:032x}-{mine.span_id:016x}-{int(mine.trace_flags):02x}"

    def end(self, failure: str = "", at: float | None = None, **facts: Any) -> None:
        """It is over, now or at this Unix time; only the first time counts. failure: why it failed."""
        if self._real is not None:
            from opentelemetry.trace import StatusCode  # noqa: PLC0415

            self._real.set_attributes(facts)
            if failure:
                self._real.set_status(StatusCode.ERROR, failure)
            self._real.end(_nanoseconds(at))
            self._real = None


OFF = Span()


def begin(name: str, parent: str | None, at: float | None = None, **facts: Any) -> Span:
    """Begin a span. parent: None begins a trace; "", what a peer without traces sends, gives no span."""
    if parent == "" or (tracer := _tracer()) is None:
        return OFF
    from opentelemetry.context import Context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    above = TraceContextTextMapPropagator().extract({"traceparent": parent or ""}, Context())
    return Span(tracer.start_span(name, above, attributes=facts, start_time=_nanoseconds(at)))


@contextmanager
def span(name: str, parent: str | None, **facts: Any) -> Iterator[None]:
    """A span around a block of code; an exception is its failure."""
    begun = begin(name, parent, **facts)
    try:
        yield
    except BaseException as error:
        begun.end(type(error).__name__)
        raise
    begun.end()


def on() -> bool:
    """Are there traces?"""
    return _tracer() is not None


class RunTrace:
    """The spans of a run at its server: the run, in it its rounds, in these their tasks.

    A run that goes on in another process begins another trace. For one thread, but for `end`.
    """

    def __init__(self, run: str) -> None:
        self.run, self._root = run, begin("run", None, run=run)
        self._round, self._tasks = OFF, dict[int, Span]()

    def sent(self, round: int, tasks: dict[int, str], **facts: Any) -> str:
        """Tasks (id -> client) go out now; return the parent of what is done for them."""
        if self._root is OFF:
            return ""
        if self._round is OFF:
            self._round = begin("round", self._root.context, run=self.run, round=round)
        for id, client in tasks.items():
            about: dict[str, Any] = {"run": self.run, "round": round, "task": id, "client": client, **facts}
            self._tasks[id] = begin("task", self._round.context, **about)
        return self._round.context

    def came(self, id: int, failure: str = "", **facts: Any) -> None:
        """What became of a task that was sent in this process."""
        self._tasks.pop(id, OFF).end(failure, **facts)

    def committed(self) -> None:
        """A round is over."""
        self._round.end()
        self._round = OFF

    def end(self, status: str) -> None:
        """The run is over, and what goes on of it."""
        for each in (*self._tasks.values(), self._round):
            each.end(status)
        self._root.end("" if status == "finished" else status, status=status)


def _nanoseconds(at: float | None) -> int | None:
    return None if at is None else int(at * 1e9)


@cache
def _tracer() -> Any:
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        log.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but there are no traces: pip install 'coterie[trace]'"
        )
        return None
    service = os.environ.get("OTEL_SERVICE_NAME", "coterie")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("coterie")
