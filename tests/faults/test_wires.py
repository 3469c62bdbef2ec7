"""What a network does to real processes: connections cut, slow, silent, spoilt; messages said twice."""

import pytest

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


def harmed(federation, config, harm, at=2):
    """How the run ended to which this was done."""
    due = [at]

    def on_round(round):
        if due and round >= at:
            due.clear()
            federation.wire.call(harm)

    run = federation.submit(config)
    ended = federation.watch(run, on_round)
    assert not due
    return run, ended


def assert_undisturbed(federation, run, ended):
    assert ended == FINISHED
    assert federation.result(run)["model_digest"] == undisturbed(RUN)


def test_connections_that_are_cut(federation):
    before = federation.wire.connections
    assert_undisturbed(federation, *harmed(federation, RUN, federation.wire.cut))
    assert federation.wire.connections > before


def test_a_bit_that_is_wrong_ends_the_connection_and_nothing_else(federation):
    before = federation.wire.connections

    def spoil():
        federation.wire.spoil = True

    assert_undisturbed(federation, *harmed(federation, RUN, spoil))
    assert federation.wire.connections > before


def test_a_slow_wire(federation):
    def slow():
        federation.wire.delay, federation.wire.rate = 0.02, 100_000

    try:
        assert_undisturbed(federation, *harmed(federation, RUN, slow))
    finally:
        federation.wire.delay, federation.wire.rate = 0.0, None


def test_a_partition_shorter_than_the_silence_costs_time_only(federation):
    wire = federation.wire

    def part():
        wire.clear.clear()
        wire.loop.call_later(2.5, wire.clear.set)

    assert_undisturbed(federation, *harmed(federation, RUN, part))


def test_a_longer_partition_loses_the_sites_tasks_with_the_reason_and_the_site_returns(federation):
    """Half open: neither end is told. The keepalive of 6 s silence finds it after 1.5 + 3 s."""
    wire = federation.wire
    run, ended = harmed(federation, RUN, wire.clear.clear)
    assert ended["status"] == "failed"
    assert "site site-1: silent for 6 s" in ended["error"]
    wire.call(wire.cut)
    wire.call(wire.clear.set)
    federation.processes["site-1"].hear("is connected")
    with federation.channel() as channel:
        from coterie.backends.network import operators

        operators.ask(channel, "Resume", operators.Which(run=run))
    assert_undisturbed(federation, run, federation.watch(run))


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
        log = (federation.home / "site-1" / "site.log").read_text()
        assert "again {" in log
