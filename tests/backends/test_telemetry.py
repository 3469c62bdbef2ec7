"""Logs, metrics and health as programs read them."""

import io
import json
import logging
import urllib.error
import urllib.request

import pytest
import structlog

from coterie.backends import telemetry
from coterie.core import ConfigError, RunError


def got(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_health_and_readiness():
    reason = ["no site is connected"]
    endpoint = telemetry.Endpoint("127.0.0.1:0", lambda: reason[0])
    try:
        telemetry.TASKS.labels("digits-1", "answered").inc(3)
        status, text = got(endpoint.port, "/metrics")
        assert (status, got(endpoint.port, "/healthz")) == (200, (200, "ok\n"))
        assert 'coterie_tasks_total{outcome="answered",run="digits-1"} 3.0' in text
        assert got(endpoint.port, "/readyz") == (503, "no site is connected\n")
        reason[0] = ""
        assert got(endpoint.port, "/readyz") == (200, "ok\n")
        assert got(endpoint.port, "/etc/passwd")[0] == 404
        with pytest.raises(RunError, match="in use"):
            telemetry.Endpoint(f"127.0.0.1:{endpoint.port}", str)
    finally:
        endpoint.close()
    with pytest.raises(ConfigError, match="host:port"):
        telemetry.Endpoint("9464x", str)


@pytest.fixture
def logged():
    log = logging.getLogger("coterie")
    before = log.handlers[:], log.propagate, log.level
    yield io.StringIO()
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


def test_log_lines_are_json_with_what_is_bound(logged):
    telemetry.log_to(logged)
    with structlog.contextvars.bound_contextvars(run="digits-1", site="north"):
        logging.getLogger("coterie").info("round %d is committed", 3)
    try:
        raise ValueError("cause")
    except ValueError:
        logging.getLogger("coterie").exception("it broke")
    first, second = map(json.loads, logged.getvalue().splitlines())
    assert (first["event"], first["run"], first["site"]) == ("round 3 is committed", "digits-1", "north")
    assert "ValueError: cause" in second["exception"]
