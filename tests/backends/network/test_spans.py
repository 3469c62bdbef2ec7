"""One trace tells of a run at its server and at its sites; without a collector there is none, nor its cost."""

import asyncio
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter

import pytest

from coterie.algorithms import Local, fedavg
from coterie.backends import spans
from coterie.backends.network import messages
from coterie.schedules import Synchronous
from coterie.storage import Blob
from deployment import SMALL, deployed
from wires import Trains, link_of, linked, opening, play, serving
from worlds import KEY, linear_world

WORLD = linear_world()
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


@pytest.fixture
def told(monkeypatch):
    """The spans that are over, in memory."""
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason="extra trace is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(spans, "_tracer", lambda: tracer)
    return exporter.get_finished_spans


def test_a_trace_joins_server_and_site_and_a_site_without_traces_takes_part(tmp_path, told):
    made = fedavg(Local(lr=0.05, epochs=1, batch_size=4))
    schedule = Synchronous(rounds=3, cohort=len(WORLD.clients), key=KEY)
    hosts = {"north": WORLD.clients[:3], "south": WORLD.clients[3:]}

    async def go():
        async with serving(tmp_path / "hub", tls=False) as (hub, port):
            hub.open(opening(), hosts)
            links = [link_of(site, port, tmp_path / site, Trains(WORLD, made), tls=False) for site in hosts]
            links[1].features = []
            async with linked(links[0]), linked(links[1]):
                plan = schedule(made, made.init(WORLD.problem.model()), WORLD.clients)
                await asyncio.to_thread(
                    play, hub, plan, "run-1", lambda c: "south" if c in hosts["south"] else "north"
                )
                hub.close("run-1", "finished")

    asyncio.run(go())
    found = told()
    tasks = len(WORLD.clients) * 3
    count = Counter(each.name for each in found)
    assert count == {"round": 3, "task": tasks, "download": 3, "upload": 9}  # play does not end the run
    assert len({each.context.trace_id for each in found}) == 1
    rounds = {each.context.span_id: each for each in found if each.name == "round"}
    for each in found:
        if each.name != "round":
            assert each.attributes["run"] == "run-1"
            assert each.attributes["site"] in ("north", "south") if each.name == "task" else "north"
            above = rounds[each.parent.span_id]
            assert above.start_time <= each.start_time
            assert above.attributes["round"] == each.attributes.get("round", above.attributes["round"])
    clients = [each.attributes["client"] for each in found if each.name == "task"]
    assert Counter(clients) == dict.fromkeys(WORLD.clients, 3)
    assert all(each.attributes["bytes_up"] > 0 for each in found if each.name == "task")


def test_what_fails_and_what_goes_on_at_the_end_is_told(told):
    trace = spans.RunTrace("r")
    assert trace.sent(1, {1: "a", 2: "b", 3: "c"}) == trace._round.context
    trace.came(1, "site north: silent for 120 s")
    trace.came(2, bytes_up=7)
    trace.came(9)  # nobody's
    trace.end("stopped")
    ends = {each.attributes.get("client", each.name): each.status.description for each in told()}
    silent = "site north: silent for 120 s"
    assert ends == {"a": silent, "b": None, "c": "stopped", "round": "stopped", "run": "stopped"}


def test_an_assign_without_a_trace_is_what_older_sites_know():
    assign = messages.Assign(
        run="r", kind="k", version=0, round=0, config={}, down=Blob("a" * 64, 7), tasks=[]
    )
    assert set(json.loads(bytes(assign))) == {
        "message", "run", "kind", "version", "round", "config", "down", "tasks"
    }  # fmt: skip
    traced = assign.model_copy(update={"trace": TRACE})
    assert messages.parse(bytes(traced)).trace == TRACE
    with pytest.raises(messages.BadMessage, match=r"assign\.trace"):
        messages.parse(bytes(traced).replace(b"00-aa", b"00-a\\n"))


def test_without_a_collector_nothing_is_imported():
    code = """
import sys
from coterie.backends import spans
with spans.span("a", None, x=1): pass
trace = spans.RunTrace("r")
assert trace.sent(1, {1: "c"}) == "" and not trace._tasks
trace.came(1); trace.end("finished")
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


def test_processes_send_their_spans_to_a_collector(tmp_path, monkeypatch):
    proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="extra trace is not installed")
    found = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            told = proto.ExportTraceServiceRequest.FromString(body)
            found.extend(
                span for all in told.resource_spans for some in all.scope_spans for span in some.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with deployed(tmp_path, sites=1) as federation:
            run = federation.submit({**SMALL, "schedule": {**SMALL["schedule"], "rounds": 2}})
            assert federation.watch(run)["status"] == "finished"
    finally:
        server.shutdown()
        server.server_close()
    count = Counter(span.name for span in found)
    assert count == {"run": 1, "round": 2, "task": 8, "download": 2, "train": 8, "upload": 8}
    assert len({span.trace_id for span in found}) == 1
    parents = {span.span_id: span.name for span in found}
    above = {"run": "", "round": "run"}
    assert all(parents.get(span.parent_span_id, "") == above.get(span.name, "round") for span in found)
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in found)
