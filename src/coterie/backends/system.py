"""Simulated devices: when the server hears of a task on the virtual clock, and who is lost.

A `Device` is a pure function of the seed, the task and the virtual time. It is put together from the time
that a task takes (a duration, or computing and sending), from when clients are online, and from who drops
out. Each client's numbers are drawn when asked for: a population of any size costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple, TypeVar

from coterie.backends import traces
from coterie.core import trees
from coterie.core.errors import ConfigError
from coterie.core.seeds import Key, derive, uniform
from coterie.core.types import ClientId, Task, Tree

T = TypeVar("T")
NORMAL = NormalDist()
DAY = 86_400.0  # seconds


class Arrival(NamedTuple):
    """When and how the server hears of a task."""

    after: float  # seconds from now
    lost: str = ""  # why no reply comes then ("dropped out", "offline", "went offline"); "" for a reply


class Link(NamedTuple):
    """A device's connection."""

    down: float  # bytes a second
    up: float  # bytes a second
    latency: float  # seconds before a message's first byte arrives, each way


Device = Callable[[Task, float], Arrival]  # task, virtual now -> arrival
Duration = Callable[[Task], float]  # seconds from the server's asking to its hearing
Speed = Callable[[Task], float]  # examples that the task's device trains on in a second
Network = Callable[[Task], Link]
# client, now, need -> seconds that it stays online from now on: 0 is offline; beyond `need` nobody looks
Online = Callable[[ClientId, float, float], float]


def device(
    *,
    duration: Duration = lambda task: 1.0,
    online: Online = lambda client, now, need: need,
    dropped: Callable[[Task], bool] = lambda task: False,
    notice: Callable[[Task], float] = lambda task: 0.0,
) -> Device:
    """Join the models of time, availability and drop-out.

    A client that is offline when asked is lost as soon as the server notices (`notice`: seconds), one that
    goes offline before it would have answered is lost at that moment, and of one that drops out nothing is
    heard until its answer would have been due.
    """

    def arrival(task: Task, now: float) -> Arrival:
        took = duration(task)
        stays = online(task.client, now, took)
        if stays <= 0:
            return Arrival(notice(task), "offline")
        if stays < took:
            return Arrival(stays, "went offline")
        return Arrival(took, "dropped out" if dropped(task) else "")

    return arrival


def drop_out(rate: float, *, key: Key) -> Callable[[Task], bool]:
    """Each task is lost with this probability, independently. Raises ConfigError outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ConfigError(f"system.drop_out = {rate}: must be in [0, 1)", "0.1 loses one client in ten")
    return lambda task: rate > 0 and uniform(derive(key, "drop-out", task.round, task.client)) < rate


def constant(*, seconds: float = 1.0, key: Key) -> Duration:
    """Every task takes the same time."""
    del key
    _positive("system.duration.seconds", seconds)
    return lambda task: seconds


def log_normal(*, seconds: float = 1.0, sigma: float = 0.5, jitter: float = 0.1, key: Key) -> Duration:
    """Some devices are slow: seconds * exp(sigma * z_client + jitter * z_task), z standard normal."""
    _positive("system.duration.seconds", seconds)

    def duration(task: Task) -> float:
        device = _quantile(_draw(key, "speed", task.client))
        moment = _normal(derive(key, "jitter", task.round, task.client))
        return seconds * math.exp(sigma * device + jitter * moment)

    return duration


def half_normal(*, seconds: float = 1.0, key: Key) -> Duration:
    """seconds * |z|, drawn anew for every task: the delays of FedBuff's simulation (Nguyen et al. 2022)."""
    _positive("system.duration.seconds", seconds)
    return lambda task: seconds * abs(_normal(derive(key, "delay", task.round, task.client)))


DURATIONS: Mapping[str, Callable[..., Duration]] = {
    "constant": constant,
    "half_normal": half_normal,
    "log_normal": log_normal,
}


def in_stages(
    *,
    speed: Speed | None = None,
    network: Network | None = None,
    samples: Callable[[ClientId], int],
    update: Callable[[Task], int] | None = None,
) -> Duration:
    """The seconds a task takes: receive what the server sends, train, send the update.

    speed, network: None costs no time. samples: training examples that a client holds. update: bytes of
    what the client sends back (None: as many as it was sent, which holds for every algorithm here while
    nothing is compressed). A task of another kind than "train" is received, but nothing is trained or sent.
    """
    size = _last_size()

    def duration(task: Task) -> float:
        train, took = task.kind == "train", 0.0
        if speed is not None and train:
            took += examples(task, samples(task.client)) / speed(task)
        if network is not None:
            link, received = network(task), size(task.down)
            sent = 0 if not train else received if update is None else update(task)
            took += 2 * link.latency + received / link.down + sent / link.up
        return took

    return duration


def examples(task: Task, count: int) -> int:
    """How many examples the task trains on, repeats included, where the client holds `count` of them.

    Whole epochs, or `steps` batches, of which the last in each epoch may be short.
    """
    steps, size = task.config.get("steps"), task.config.get("batch_size")
    if steps is None:
        return int(task.config.get("epochs", 1)) * count
    size = min(size or count, count)
    epochs, rest = divmod(steps, -(-count // size))
    return int(epochs * count + min(rest * size, count))


def constant_speed(*, samples_per_second: float, key: Key) -> Speed:
    """Every device is equally fast."""
    del key
    _positive("system.compute.samples_per_second", samples_per_second)
    return lambda task: samples_per_second


def log_normal_speed(
    *, samples_per_second: float, sigma: float = 0.5, jitter: float = 0.0, key: Key
) -> Speed:
    """A few are much slower: samples_per_second * exp(sigma * z_client + jitter * z_task), z standard normal.

    samples_per_second is the median device's.
    """
    _positive("system.compute.samples_per_second", samples_per_second)
    factor = _log_normal("compute", sigma, jitter, key)
    return lambda task: samples_per_second * factor(task)


def speed_trace(*, file: Path, key: Key, folder: Path) -> Speed:
    """Measured devices: a CSV file with columns client, samples_per_second."""
    measured = traces.devices(file, ("samples_per_second",), folder)
    row = dealt(measured, key)
    return lambda task: row(task.client)[0]


COMPUTE: Mapping[str, Callable[..., Speed]] = {
    "constant": constant_speed,
    "log_normal": log_normal_speed,
    "trace": speed_trace,
}


def constant_network(*, down: float, up: float, latency: float = 0.0, key: Key) -> Network:
    """Every device has the same connection."""
    del key
    link = _link(down, up, latency)
    return lambda task: link


def log_normal_network(
    *, down: float, up: float, latency: float = 0.0, sigma: float = 0.5, jitter: float = 0.0, key: Key
) -> Network:
    """A few are much slower: both bandwidths times exp(sigma * z_client + jitter * z_task).

    down, up: bytes a second of the median device; a device that is slow one way is as slow the other.
    """
    link = _link(down, up, latency)
    factor = _log_normal("network", sigma, jitter, key)

    def network(task: Task) -> Link:
        scale = factor(task)
        return Link(link.down * scale, link.up * scale, link.latency)

    return network


def network_trace(*, file: Path, latency: float = 0.0, key: Key, folder: Path) -> Network:
    """Measured connections: a CSV file with columns client, down, up (bytes a second)."""
    _not_negative("system.network.latency", latency)
    measured = traces.devices(file, ("down", "up"), folder)
    row = dealt(measured, key)

    def network(task: Task) -> Link:
        down, up = row(task.client)
        return Link(down, up, latency)

    return network


NETWORK: Mapping[str, Callable[..., Network]] = {
    "constant": constant_network,
    "log_normal": log_normal_network,
    "trace": network_trace,
}


def always(*, key: Key) -> Online:
    """Everybody is online all the time."""
    del key
    return lambda client, now, need: need


def bernoulli(*, online: float = 0.8, period: float = 3600.0, key: Key) -> Online:
    """Online or not, drawn anew every `period` seconds for each client; `online` is the probability."""
    _share("system.availability.online", online)
    _positive("system.availability.period", period)
    if online == 1:
        return always(key=key)

    def stays(client: ClientId, now: float, need: float) -> float:
        own = derive(key, "availability", client)
        place = now / period + uniform(own)  # clients do not change all at the same moment
        slot, left = math.floor(place), 0.0
        while left < need and uniform(derive(own, slot)) < online:
            slot += 1
            left = (slot - place) * period
        return left

    return stays


def daily(*, online: float = 0.3, spread: float = 1.0, period: float = DAY, key: Key) -> Online:
    """Online for one stretch of each day, such as a telephone that charges at night.

    online: the stretch, as a share of the day. It begins at a moment of the client's own, uniform in the
    first `spread` of the day: 0 is one time zone, 1 the whole world. period: seconds in a day.
    """
    _share("system.availability.online", online)
    _positive("system.availability.period", period)
    if not 0 <= spread <= 1:
        raise ConfigError(f"system.availability.spread = {spread}: must be in [0, 1]", "1 is the whole day")
    if online == 1:
        return always(key=key)

    def stays(client: ClientId, now: float, need: float) -> float:
        del need
        since = (now / period - spread * _draw(key, "availability", client)) % 1.0
        return max(online - since, 0.0) * period

    return stays


def online_trace(*, file: Path, period: float | None = None, key: Key, folder: Path) -> Online:
    """Measured stretches: a CSV file with columns client, start, end (seconds), again every `period`.

    period: None is the file's last end.
    """
    if period is not None:
        _positive("system.availability.period", period)
    measured, period = traces.stretches(file, period, folder)
    row = dealt(measured, key)
    return lambda client, now, need: row(client).stays(now % period, need, period)


AVAILABILITY: Mapping[str, Callable[..., Online]] = {
    "always": always,
    "bernoulli": bernoulli,
    "daily": daily,
    "trace": online_trace,
}


def dealt(measured: Mapping[ClientId, T], key: Key) -> Callable[[ClientId], T]:
    """Which device of a trace a client has: the one of its own name, or else one drawn by its key.

    It is the same one each time, and in every file that lists as many devices in the same order; so a trace
    of 500 devices serves any number of clients, and speed, bandwidth and hours of a device stay together.
    """
    pack = list(measured.values())

    def device(client: ClientId) -> T:
        own = measured.get(client)
        return pack[int(_draw(key, "trace", client) * len(pack))] if own is None else own

    return device


def _last_size() -> Callable[[Tree], int]:
    """nbytes, which looks at a tree once: the tasks of a round share theirs."""
    last: list[tuple[Tree, int]] = [(None, 0)]

    def size(tree: Tree) -> int:
        if last[0][0] is not tree:
            last[0] = (tree, trees.nbytes(tree))
        return last[0][1]

    return size


def _log_normal(purpose: str, sigma: float, jitter: float, key: Key) -> Callable[[Task], float]:
    _not_negative(f"system.{purpose}.sigma", sigma)
    _not_negative(f"system.{purpose}.jitter", jitter)

    def factor(task: Task) -> float:
        exponent = sigma * _quantile(_draw(key, purpose, task.client))
        if jitter:
            exponent += jitter * _normal(derive(key, f"{purpose} jitter", task.round, task.client))
        return math.exp(exponent)

    return factor


def _link(down: float, up: float, latency: float) -> Link:
    _positive("system.network.down", down)
    _positive("system.network.up", up)
    _not_negative("system.network.latency", latency)
    return Link(down, up, latency)


@lru_cache(maxsize=2**16)
def _draw(key: Key, purpose: str, client: ClientId) -> float:
    """A client's own draw from [0, 1): the same for all of its tasks."""
    return uniform(derive(key, purpose, client))


def _normal(key: Key) -> float:
    return _quantile(uniform(key))


def _quantile(share: float) -> float:
    return NORMAL.inv_cdf(share or 2.0**-54)


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} = {value}: must be > 0")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} = {value}: must be >= 0")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name} = {value}: must be in (0, 1]", "0.8 is four clients in five")
