"""What worker processes and Ray actors are built from in tests: they import it by name."""

import asyncio
import os
import signal
from pathlib import Path

from coterie.core import ConfigError, drive, trees
from coterie.experiment import assemble, load
from coterie.storage import Memories


def site_of(config, store, trap=None):
    """A site for `config`; trap(task) is called before a client trains."""
    site = assemble(load(config)).site(store)
    if trap is not None:
        fit = site.trainer.fit

        def trapped(algorithm, task, memory, data):
            trap(task)
            return fit(algorithm, task, memory, data)

        site.trainer.fit = trapped
    return site


def played(config, pool_of):
    """Digest of the final model, the commits' metrics and the memories of a run on a pool."""
    parts, memories = assemble(load(config)), Memories()
    commits = []
    pool = pool_of(parts.site(memories))
    try:
        plan = parts.schedule(parts.algorithm, parts.algorithm.init(parts.initial), parts.population.clients)
        state = asyncio.run(drive(plan, parts.backend(pool, None), on_commit=commits.append))
    finally:
        pool.close()
    return trees.digest(state["model"]), [(c.metrics, c.resume) for c in commits]


def dies_once(folder, task):
    """SIGKILL at the first client that finds a token in `folder`."""
    for token in Path(folder).glob("token-*"):
        try:
            token.unlink()
        except FileNotFoundError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


def dies_on(client, task):
    if task.client == client:
        os.kill(os.getpid(), signal.SIGKILL)


def refuses(client, task):
    if task.client == client:
        raise ConfigError(f"{client} is wrong", "leave it out")


def fails(client, task):
    if task.client == client:
        raise OSError(f"{client} has lost its disk")


def cannot_start(store):
    raise ConfigError("no such data", "look elsewhere")


def ends_at_once(store):
    os._exit(3)
