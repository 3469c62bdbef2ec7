"""What a network does to real processes: connections cut, slow, silent, spoilt; messages said twice."""

import pytest

from coterie.backends.network import operators
from deployment import LONG, Deployment, deployed, undisturbed
from faults.wire import wire

RUN = {**LONG, "schedule": {**LONG["schedule"], "rounds": 8}}
FINISHED = {"status": "finished", "error": ""}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Site 1 is reached through `federation.wire`; a site is lost after 6 s."""
    made = Deployment(tmp_path_factory.mktemp("wires"), server=("--silence", "6"))
    with wire(made.port) as proxy:
        made.wire, made.ways["site-1"] = proxy, proxy.address
        try:
            made.start()
            yield made
        finally:
            made.close()
    assert made.orphans() == []


def test_what_a_wire_does_costs_time_only(federation):
    """Cut, spoilt, slow, and silent for less than the silence: in this order, in one run."""
    wire, before = federation.wire, federation.wire.connections

    def spoil():
        wire.spoil = True

    def slow():
        wire.delay, wire.rate = 0.02, 200_000

    def part():
        wire.delay, wire.rate = 0.0, None
        wire.clear.clear()
        wire.loop.call_later(3.0, wire.clear.set)

    harms = {2: wire.cut, 6: spoil, 10: slow, 13: part}

    def on_round(round):
        if due := [at for at in harms if at <= round][:1]:
            wire.call(harms.pop(due[0]))

    run = federation.submit(LONG)
    assert federation.watch(run, on_round) == FINISHED
    assert harms == {}
    assert federation.result(run)["model_digest"] == undisturbed(LONG)
    assert wire.connections >= before + 4  # each time a site comes again, with two


def test_a_longer_partition_loses_the_sites_tasks_with_the_reason_and_the_site_returns(federation):
    """Half open: neither end is told. The site itself finds out, by its keepalive, after 30 + 60 s."""
    wire, due = federation.wire, [True]

    def on_round(round):
        if round >= 2 and due:
            due.clear()
            wire.call(wire.clear.clear)

    run = federation.submit(RUN)
    ended = federation.watch(run, on_round)
    assert ended["status"] == "failed"
    assert "site site-1: silent for 6 s" in ended["error"]
    wire.call(wire.cut)
    wire.call(wire.clear.set)
    federation.processes["site-1"].hear("is connected")
    with federation.channel() as channel:
        operators.ask(channel, "Resume", operators.Which(run=run))
    assert_undisturbed(federation, run, federation.watch(run))


def assert_undisturbed(federation, run, ended):
    assert ended == FINISHED
    assert federation.result(run)["model_digest"] == undisturbed(RUN)


def test_messages_said_twice_and_old_ones_again_change_nothing(tmp_path):
    with deployed(tmp_path, start=False) as federation:
        for number, name in enumerate(("server", *federation.names)):
            federation.start(name, fault={"at": None, "do": ["echo", number]})
        run = federation.submit(RUN)
        assert_undisturbed(federation, run, federation.watch(run))


def test_damaged_chunks_are_sent_again_and_a_clock_that_jumps_moves_nothing(tmp_path):
    with deployed(tmp_path, start=False) as federation:
        federation.start("server", fault={"at": ["heard", "answered", 6], "do": ["jump", 3600]})
        federation.start("site-1", fault={"at": None, "do": ["damage", 3]})
        federation.start("site-2", fault={"at": ["sent", "answered", 6], "do": ["jump", -3600]})
        run = federation.submit(RUN)
        assert_undisturbed(federation, run, federation.watch(run))
        log = federation.processes["site-1"].log.read_text()
        assert "again {" in log
