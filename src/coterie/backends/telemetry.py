"""What a server and a site tell of themselves: logs for programs, Prometheus metrics, health.

Logs are the library's own (logging, "coterie"), written as JSON lines or as text. Metrics and health are
served over plain HTTP on an address of their own: /metrics, /healthz (the process answers), /readyz (it can
do its work; 503 with the reason where not). No secret is ever among them. Traces are in `spans`.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from coterie.core.errors import ConfigError, RunError

log = logging.getLogger("coterie")
REGISTRY = CollectorRegistry()
CONNECTED = Gauge("coterie_sites_connected", "Sites that are connected now.", registry=REGISTRY)
RUNS = Gauge("coterie_runs", "Runs by status.", ["status"], registry=REGISTRY)
TASKS = Counter("coterie_tasks", "Tasks by how they ended.", ["run", "outcome"], registry=REGISTRY)
ROUNDS = Counter("coterie_rounds", "Committed rounds.", ["run"], registry=REGISTRY)
SECONDS = (0.05, 0.2, 1, 5, 20, 60, 300, 1800, 7200)
ROUND_SECONDS = Histogram(
    "coterie_round_seconds", "From one commit to the next.", buckets=SECONDS, registry=REGISTRY
)
BYTES = Counter("coterie_bytes", "Bytes of models and updates.", ["way"], registry=REGISTRY)
RECONNECTS = Counter("coterie_reconnects", "Connections that broke and were made again.", registry=REGISTRY)


def log_to(stream: Any = None, *, as_json: bool = True, level: str = "INFO") -> None:
    """Send the library's log to a stream (standard error), one line an event; JSON or text.

    What `structlog.contextvars.bind_contextvars(run=..., site=...)` has bound is in every line.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    shown = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=False)
    final: list[Any] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        shown,
    ]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)


class Endpoint:
    """Serves metrics and health until closed. address: "host:port"; port 0 takes a free one (`port`).

    ready: why the process cannot work now; "" when it can. Raises ConfigError for a bad address, RunError
    when it is in use.
    """

    def __init__(self, address: str, ready: Callable[[], str]) -> None:
        host, _, port = address.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"metrics address {address!r}: must be host:port", "for example 127.0.0.1:9464")
        metrics = make_wsgi_app(REGISTRY)

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return metrics(environ, start)  # type: ignore[no-any-return]
            reason = {"/healthz": "", "/readyz": ready() if path == "/readyz" else ""}.get(path)
            code = "404 Not Found" if reason is None else "503 Service Unavailable" if reason else "200 OK"
            start(code, [("Content-Type", "text/plain; charset=utf-8")])
            return [(reason or code[4:].lower()).encode() + b"\n"]

        try:
            self._server = make_server(host or "127.0.0.1", int(port), answer, _Threads, _Silent)
        except OSError as error:
            raise RunError(
                f"metrics address {address}: {error.strerror}", "take another port, or port 0"
            ) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Threads(WSGIServer):
    daemon_threads = True
    allow_reuse_address = True

    def process_request(
        self, request: Any, client_address: Any
    ) -> None:  # a slow reader keeps nobody waiting
        threading.Thread(target=self._one, args=(request, client_address), daemon=True).start()

    def _one(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # it went away
        finally:
            self.shutdown_request(request)


class _Silent(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass
