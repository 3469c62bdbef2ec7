"""`[system]`: the simulated devices of a run, read from its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coterie.backends import system as simulated
from coterie.core import ClientId, ConfigError, Key
from coterie.experiment import parts

Section = dict[str, Any]


def device(
    section: Mapping[str, Any], *, key: Key, samples: Callable[[ClientId], int], folder: Path
) -> simulated.Device:
    """The devices that `[system]` describes. samples: training examples that a client holds.

    folder: where the paths of traces start, else at the current folder. Raises ConfigError for whatever the
    section says that cannot be.
    """
    provided = {"key": key, "samples": samples, "folder": folder}
    return parts.call(system, section, "system", provided, label="system")  # type: ignore[no-any-return]


def system(
    *,
    duration: Section | None = None,
    compute: Section | None = None,
    network: Section | None = None,
    availability: Section | None = None,
    drop_out: float = 0.0,
    key: Key,
    samples: Callable[[ClientId], int],
    folder: Path,
) -> simulated.Device:
    """What `[system]` takes: how long tasks take, or from what that follows, and who is lost."""
    provided = {"key": key, "folder": folder}

    def built(table: parts.Table, chosen: Section | None, name: str) -> Any:
        return None if chosen is None else parts.build(table, chosen, f"system.{name}", provided)

    if duration is not None and (compute is not None or network is not None):
        raise ConfigError(
            "system.duration: is the time of a whole task, so it cannot stand beside compute or network",
            "leave it out, or leave out the other two",
        )
    speed: simulated.Speed | None = built(simulated.COMPUTE, compute, "compute")
    link: simulated.Network | None = built(simulated.NETWORK, network, "network")
    online: simulated.Online = built(
        simulated.AVAILABILITY, availability or {"kind": "always"}, "availability"
    )
    took: simulated.Duration
    if speed is None and link is None:
        took = built(simulated.DURATIONS, duration or {"kind": "constant"}, "duration")
    else:
        took = simulated.in_stages(speed=speed, network=link, samples=samples)
    return simulated.device(
        duration=took,
        online=online,
        dropped=simulated.drop_out(drop_out, key=key),
        notice=(lambda task: link(task).latency) if link else (lambda task: 0.0),
    )
