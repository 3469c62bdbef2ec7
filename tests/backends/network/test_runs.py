"""A run over the network ends as the run in this process does, whatever happens to the connections."""

import asyncio
import random
from contextlib import AsyncExitStack

import pytest

from coterie.algorithms import Local, fedavg, scaffold
from coterie.core import trees
from coterie.schedules import Synchronous
from wires import Proxy, Trains, link_of, linked, opening, play, serving
from worlds import KEY, linear_world

WORLD = linear_world()
SITES = ("north", "south", "west")


def place_of(client):
    return SITES[int(client[-1]) % 3]


HOSTS = {site: [client for client in WORLD.clients if place_of(client) == site] for site in SITES}


def parts(algorithm=scaffold, rounds=4):
    local = Local(lr=0.05, epochs=1, batch_size=4)
    made = fedavg(local) if algorithm is fedavg else scaffold(local, population=len(WORLD.clients))
    return made, Synchronous(rounds=rounds, cohort=5, key=KEY)


def in_process(algorithm=scaffold, rounds=4):
    return trees.digest(WORLD.play(*parts(algorithm, rounds)).state)


async def over_network(folder, algorithm=scaffold, rounds=4, tls=True, trouble=None):
    """Run it on three sites behind a proxy each; `trouble(proxies)` goes on meanwhile."""
    made, schedule = parts(algorithm, rounds)
    async with AsyncExitStack() as stack:
        ended = {}  # as a database would know
        hub, port = await stack.enter_async_context(
            serving(folder / "hub", tls=tls, ended=lambda run: ended.get(run, ""))
        )
        proxies = [await stack.enter_async_context(Proxy(port)) for _ in SITES]
        hub.open(opening(), HOSTS)
        links = [
            await stack.enter_async_context(
                linked(link_of(site, proxy.address, folder / site, Trains(WORLD, made), tls=tls))
            )
            for site, proxy in zip(SITES, proxies, strict=True)
        ]
        plan = schedule(made, made.init(WORLD.problem.model()), WORLD.clients)
        job = trouble and asyncio.ensure_future(trouble(proxies))
        state = await asyncio.to_thread(play, hub, plan, "run-1", place_of)
        if job:
            job.cancel()
        ended["run-1"] = "finished"
        hub.close("run-1", "finished")
        assert list(hub.blobs) == []
        for link in links:
            while not link.handler.of("closed"):
                await asyncio.sleep(0.01)
            assert link.desk.answered == {}
        return trees.digest(state), links


@pytest.mark.parametrize("algorithm", [fedavg, scaffold])
def test_the_same_bits_as_in_one_process(tmp_path, algorithm):
    digest, links = asyncio.run(over_network(tmp_path, algorithm))
    assert digest == in_process(algorithm)
    assert sum(link.handler.count for link in links) == 4 * 5


@pytest.mark.parametrize("seed", range(3))
def test_the_same_bits_when_connections_are_cut_at_random(tmp_path, seed):
    draw = random.Random(seed)
    cuts = 0

    async def trouble(proxies):
        nonlocal cuts
        while True:
            proxy = draw.choice(proxies)
            proxy.budget = proxy.bytes.total() + draw.randrange(20_000)
            while proxy.budget is not None:
                await asyncio.sleep(0.01)
            cuts += 1

    digest, links = asyncio.run(over_network(tmp_path, rounds=12, trouble=trouble))
    assert digest == in_process(rounds=12)
    assert cuts > 3
    assert sum(link.handler.count for link in links) == 12 * 5  # nothing was trained twice


def test_a_run_goes_on_from_its_log(tmp_path):
    """Stop before the plan sees event n, start again from the log: same end, and the logged is not redone."""
    made, schedule = parts(rounds=3)

    class Stop(Exception):
        pass

    async def go(upto):
        log = []

        def on_event(record):
            log.append((record.now, record.head))
            if len(log) == upto:
                raise Stop

        def plan():
            return schedule(made, made.init(WORLD.problem.model()), WORLD.clients)

        handlers = {site: Trains(WORLD, made) for site in SITES}
        for again in (False, True):
            async with serving(tmp_path / f"hub-{upto}") as (hub, port), AsyncExitStack() as sites:
                hub.open(opening(), HOSTS)
                for site in SITES:
                    folder = tmp_path / f"{site}-{upto}"
                    await sites.enter_async_context(linked(link_of(site, port, folder, handlers[site])))
                heard = (lambda record: None) if again else on_event
                try:
                    state = await asyncio.to_thread(
                        play, hub, plan(), "run-1", place_of, replay=list(log), on_event=heard
                    )
                except Stop:
                    continue
        return trees.digest(state), sum(handler.count for handler in handlers.values())

    for upto in (1, 4, 5):  # not across a commit, where a log is pruned
        digest, count = asyncio.run(go(upto))
        assert digest == in_process(rounds=3)
        assert count == 15
