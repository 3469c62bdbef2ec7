"""A Ray cluster: actors that work as the processes of `workers` do, on any number of machines.

The model goes into Ray's object store once a call and is read there by every actor of a machine; what the
sites are built from (the data set) once a run. One partial fold comes back from each actor. Actors that die
are replaced while the cluster has room for them; what they had not given back is worked on again.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from coterie.backends.crew import Crew, Died, Hand
from coterie.backends.shards import Failed, Make, Parcel, Shard, listen, opened, owned, packed, portable
from coterie.backends.site import Site
from coterie.core.errors import ConfigError, RunError
from coterie.core.gather import OnNan
from coterie.core.types import Tree

PATIENCE = 120.0  # seconds without a sign of life from any actor that starts, when there is no other
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def ray_cluster(
    site: Site,
    make: Make,
    *,
    address: str | None = None,
    actors: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    threads: int = 1,
) -> Crew:
    """A Pool of Ray actors. make: builds each actor's site, from modules that every machine can import.

    site: what a single process would be. address: of a running cluster, "auto" for this machine's; None
    starts one on this machine alone. actors: default as many as the cluster has CPUs for. cpus, gpus: that
    each actor takes, fractions allowed. Raises ConfigError when Ray is missing, the cluster is not reachable
    or has no room for an actor.
    """
    if (actors is not None and actors < 1) or cpus < 0 or gpus < 0:
        raise ConfigError(
            f"backend: actors = {actors}, cpus = {cpus}, gpus = {gpus}: actors must be >= 1, the others >= 0"
        )
    return Crew(site, Actors(make, address, actors, {"num_cpus": cpus, "num_gpus": gpus}, threads))


class Actors:
    """A Staff of Ray actors."""

    def __init__(
        self, make: Make, address: str | None, actors: int | None, each: dict[str, float], threads: int
    ) -> None:
        self.ray, self.threads = _ray(), threads
        self.started = _join(self.ray, address)
        try:
            self.count = self._fitting(actors, each)
            self.make = self._stored(make)
        except BaseException:
            self.close()
            raise
        self.kind = self.ray.remote(Actor).options(
            **each, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )

    def hire(self) -> Hand:
        """Start an actor; it waits in Ray's queue while the cluster has no room for it."""
        return Engaged(self.ray, self.kind.remote(self.make, self.threads))

    def spread(self, downs: Tree) -> Any:
        """Put it into the object store."""
        parcel = packed(downs)
        return self.ray.put(Parcel(parcel.tree, parcel.flat.numpy()))

    def wait(self, hands: Sequence[Hand]) -> Sequence[Hand]:
        """Those that have answered or died."""
        engaged = {hand.future: hand for hand in hands if isinstance(hand, Engaged)}
        futures = list(engaged)
        patience = None if any(hand.ready for hand in engaged.values()) else PATIENCE
        if not self.ray.wait(futures, timeout=patience)[0]:
            raise RunError(
                f"the Ray cluster started no actor within {PATIENCE:.0f} s: it has no room left for one",
                "see `ray status`; then go on with --resume, perhaps with fewer backend.cpus or backend.gpus",
            )
        return [engaged[f] for f in self.ray.wait(futures, num_returns=len(futures), timeout=0)[0]]

    def close(self) -> None:
        """Leave the cluster, or stop it if it was started here."""
        self.make = None
        if self.started:
            with _quiet():
                self.ray.shutdown()
            self.started = False

    def _fitting(self, actors: int | None, each: dict[str, float]) -> int:
        """How many actors to start. Raises ConfigError when there is no room for one."""
        has = self.ray.cluster_resources()
        shares = [
            (has.get(name, 0.0), need)
            for name, need in (("CPU", each["num_cpus"]), ("GPU", each["num_gpus"]))
            if need
        ]
        room = min((int(total / need + 1e-9) for total, need in shares), default=int(has.get("CPU", 1)))
        if not room:
            raise ConfigError(
                f"backend.cpus = {each['num_cpus']:g}, gpus = {each['num_gpus']:g}: the Ray cluster has "
                f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs in all",
                "lower backend.cpus or backend.gpus",
            )
        return actors or room

    def _stored(self, make: Make) -> Any:
        """What sites are built from, in the object store: its tensors are read there and not copied."""
        ray = self.ray
        ray.util.register_serializer(Tensor, serializer=_to_array, deserializer=_from_array)
        try:
            return ray.put(make)
        except Exception as error:
            raise ConfigError(
                f"backend: the experiment cannot be sent to the Ray cluster: {error}",
                "define models, data sets and functions at the top of a module that its machines can import",
            ) from error
        finally:
            ray.util.deregister_serializer(Tensor)


class Engaged:
    """An actor, and the future of what it was asked last."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor
        self.ready = False
        self.future = actor.start.remote()

    def brief(self, on_nan: OnNan | None, downs: Any) -> None:
        """Name the new call; the actor reads `downs` from its machine's object store."""
        self.actor.brief.remote(on_nan, downs)

    def ask(self, what: str, tree: Tree = None) -> None:
        """Send a request."""
        parcel = packed(tree)
        self.future = self.actor.answer.remote(what, Parcel(parcel.tree, parcel.flat.numpy()))

    def answer(self) -> Parcel | Failed | None:
        """Fetch what it answers. Raises Died."""
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(self.future)
        except errors.RayTaskError as error:  # what sites are built from cannot be imported there
            raise RunError(f"a Ray actor failed: {error}") from None
        except errors.RayError as error:
            raise Died(_how(error)) from None
        self.ready = True
        if answer is None or isinstance(answer, Failed):
            return answer
        return Parcel(answer.tree, owned(answer.flat))

    def end(self, *, at_once: bool) -> None:  # noqa: ARG002  Ray knows one way
        """Kill it."""
        self.ray.kill(self.actor)


class Actor:
    """What runs in Ray: a Shard."""

    def __init__(self, make: Make, threads: int) -> None:
        torch.set_num_threads(threads)
        self.make = make
        self.shard: Shard | None = None

    def start(self) -> Failed | None:
        """Build the site; the error, if it cannot be."""
        try:
            self.shard = Shard(self.make, listen())
        except Exception as error:
            return Failed(portable(error))
        return None

    def brief(self, on_nan: OnNan | None, downs: Parcel) -> None:
        """As Shard.brief."""
        assert self.shard is not None
        self.shard.brief(on_nan, downs)

    def answer(self, what: str, parcel: Parcel) -> Parcel | Failed:
        """As Shard.answer."""
        assert self.shard is not None
        answer = self.shard.answer(what, parcel)
        return answer if isinstance(answer, Failed) else Parcel(answer.tree, answer.flat.numpy())


def _ray() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: PLC0415  heavy, and an extra
    except ImportError:
        raise ConfigError(
            'backend.kind = "ray": Ray is not installed', "pip install 'coterie[ray]'"
        ) from None
    return ray


def _join(ray: Any, address: str | None) -> bool:
    """Connect this process to a cluster, unless it is; say whether the cluster must be stopped at the end."""
    if ray.is_initialized():
        return False
    try:
        _knock(address or "")
        with _quiet():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"backend.address = {address!r}: no Ray cluster can be reached: {str(error).splitlines()[0]}",
            "start one with: ray start --head",
        ) from None
    return True


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at a host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _how(error: Exception) -> str:
    """Ray explains the death of an actor at length; one line of it will do."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_array(tensor: Tensor) -> Any:
    parcel = packed(tensor)
    return Parcel(parcel.tree, parcel.flat.numpy())


def _from_array(parcel: Parcel) -> Tensor:
    tensor = opened(parcel)
    assert isinstance(tensor, Tensor)
    return tensor
