"""Simulated devices: how long a task takes on the virtual clock, and who drops out; functions of the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

from coterie.core.errors import ConfigError
from coterie.core.seeds import Key, derive, uniform
from coterie.core.types import Task

Duration = Callable[[Task], float]


def constant(*, seconds: float = 1.0, key: Key) -> Duration:
    """Every task takes the same time."""
    del key
    _positive("seconds", seconds)
    return lambda task: seconds


def log_normal(*, seconds: float = 1.0, sigma: float = 0.5, jitter: float = 0.1, key: Key) -> Duration:
    """Some devices are slow: seconds * exp(sigma * z_client + jitter * z_task), z standard normal."""
    _positive("seconds", seconds)

    def duration(task: Task) -> float:
        device = _normal(derive(key, "speed", task.client))
        moment = _normal(derive(key, "jitter", task.round, task.client))
        return seconds * math.exp(sigma * device + jitter * moment)

    return duration


def half_normal(*, seconds: float = 1.0, key: Key) -> Duration:
    """seconds * |z|, drawn anew for every task: the delays of FedBuff's simulation (Nguyen et al. 2022)."""
    _positive("seconds", seconds)
    return lambda task: seconds * abs(_normal(derive(key, "delay", task.round, task.client)))


DURATIONS: Mapping[str, Callable[..., Duration]] = {
    "constant": constant,
    "half_normal": half_normal,
    "log_normal": log_normal,
}


def drop_out(rate: float, *, key: Key) -> Callable[[Task], bool]:
    """Each task is lost with this probability, independently. Raises ConfigError outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ConfigError(f"system.drop_out = {rate}: must be in [0, 1)", "0.1 loses one client in ten")
    return lambda task: rate > 0 and uniform(derive(key, "drop-out", task.round, task.client)) < rate


def _normal(key: Key) -> float:
    return NormalDist().inv_cdf(uniform(key) or 2.0**-54)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"system.duration.{name} = {value}: must be > 0")
