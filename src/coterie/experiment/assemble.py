"""From a config to the parts of a run, joined; pairs that cannot work are refused, with the way out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from coterie.aggregators import krum, mean
from coterie.algorithms import ALGORITHMS, OPTIMIZERS, Local, gradient
from coterie.backends import Device, InProcess, Pool, Site, Store, Trainer, ray_cluster, workers
from coterie.core import (
    Aggregator,
    Algorithm,
    ClientId,
    ConfigError,
    derive,
    native,
    seeded,
    transformed,
    trees,
)
from coterie.core.transforms import update_like
from coterie.data import (
    DATASETS,
    PARTITIONS,
    Dataset,
    Lazy,
    Population,
    from_torch,
    holdings,
    populate,
)
from coterie.experiment import parts
from coterie.experiment.chain import TRANSFORMS, chain_of
from coterie.experiment.config import Config, data_folders, to_dict
from coterie.experiment.promise import Promise, promise, with_multiplier
from coterie.experiment.refusals import refuse_parts
from coterie.experiment.system import device
from coterie.models import MODELS
from coterie.schedules import SCHEDULES, STALENESS, Buffered, Gossip
from coterie.schedules.synchronous import share
from coterie.trainers import Custom, Loop, Problem, Vectorised

log = logging.getLogger("coterie")
TRAINERS = ("auto", "vectorised", "loop", "custom")
AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {"krum": krum, "mean": mean}


class Elsewhere(NamedTuple):
    """Stands for the trainer in a process that does not train: each site chooses what it can use."""

    name: str = "sites"


@dataclass(frozen=True)
class Parts:
    """Everything that a run needs, built and checked; nothing has been written or trained yet."""

    config: Config
    population: Population
    problem: Problem
    begin: Callable[[], Any]  # makes the model before training: {"params", "buffers"}
    local: Local
    algorithm: Algorithm
    schedule: Any
    trainer: Loop | Custom | Vectorised | Elsewhere
    note: str  # which trainer was chosen, and why
    test: tuple[Tensor, Tensor]  # the global test set
    model: nn.Module | None  # objects that were given instead of names in the config
    fit: Callable[..., Any] | None
    promise: Promise | None = None  # of privacy

    @property
    def initial(self) -> Any:
        """The model before training: {"params", "buffers"}."""
        return self.begin()

    def pool(self, memories: Store) -> Pool:
        """Who answers the clients' tasks: this process, several, or a Ray cluster."""
        site, settings = self.site(memories), self.config.backend
        kind = self.trainer.name
        make = partial(worker_site, self.config, kind, self.population.dataset, self.model, self.fit)
        threads = self.config.run["threads"]
        if settings["kind"] == "ray":
            names = ("address", "actors", "cpus", "gpus")
            options = {name: settings[name] for name in names if name in settings}
            return ray_cluster(site, make, **options, threads=threads)
        return workers(site, make, settings["workers"], threads=threads) if settings["workers"] > 1 else site

    def site(self, memories: Store) -> Site:
        """What answers them in one process."""
        assert not isinstance(self.trainer, Elsewhere)
        return _site(self.population, self.problem, self.algorithm, self.trainer, memories)

    def backend(self, pool: Pool, clock: Mapping[str, Any] | None) -> InProcess:
        """The simulation of the configured devices."""
        return InProcess(pool, device=self.device(), clock=clock, on_nan=self.config.run["on_nan"])

    def device(self) -> Device:
        """The simulated devices."""
        config, key = self.config, derive(self.config.seed, "system")
        return device(config.system, key=key, samples=self._samples, folder=config.folder)

    def _samples(self, client: ClientId) -> int:
        return self.population.sizes(client)[0]


def assemble(
    config: Config,
    *,
    data_dir: Path | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    fit: Callable[..., Any] | None = None,
    away: Any = None,
    trains: bool = True,
) -> Parts:
    """Build every part of the config. model, dataset, fit: objects to use instead of the config's.

    trains: False where others do all tasks: which trainer fits is not tried out, and the initial model is
    made anew whenever it is asked for.
    away: an `away.Away`, where the config's model and trainer must not be loaded in this process.
    Raises ConfigError or DataError.
    """
    dataset = dataset or load_dataset(config, data_dir)
    population = load_population(config, dataset)
    problem, initial = (away, away.initial) if away else _problem(config, dataset, model)
    begin: Callable[[], Any] = lambda: initial  # noqa: E731
    if not trains and not away:
        begin = lambda: _problem(config, dataset, model)[1]  # noqa: E731
    schedule = _schedule(config, population)
    local, algorithm = _plain(config, len(population.clients))
    promised = promise(config, schedule, len(population.clients), _dimension(config, algorithm, initial))
    if promised is not None:
        refuse_parts(config, promised.noise, algorithm, initial)
        config, schedule = with_multiplier(config, promised), replace(schedule, rounds=promised.rounds)
    algorithm = transformed(algorithm, chain_of(config, len(population.clients)))
    trainer, note = (
        (away, away.note) if away else _trainer(config, problem, algorithm, population, fit, trains)
    )
    test = _test(population)
    some = dataset.train if dataset.remote else None
    inputs, targets = (dataset.prepare(some.x[:2]), some.y[:2]) if some else (test[0][:2], test[1][:2])
    problem.check(inputs, targets, len(dataset.classes) if dataset.classes else None)
    made = Parts(
        config,
        population,
        problem,
        begin,
        local,
        algorithm,
        schedule,
        trainer,
        note,
        test,
        model,
        fit,
        promised,
    )
    made.device()  # checks [system]
    _refuse_pairs(made)
    plan = schedule(algorithm, algorithm.init(initial), population.clients)
    next(plan)  # a plan does no I/O, so what it would refuse at its start is found out here
    plan.close()
    if not trains and not away:
        problem.forget()
    return made


def worker_site(
    config: Config,
    kind: str,
    dataset: Dataset,
    model: nn.Module | None,
    fit: Callable[..., Any] | None,
    memories: Store,
) -> Site:
    """A worker's site: as that of the process that assembled the config, whose trainer was of this kind."""
    native.set_threads(config.backend["threads"])
    population = load_population(config, dataset)
    problem, _ = _problem(config, dataset, model)
    _, algorithm = _algorithm(config, len(population.clients))
    trainer = _made(kind, config, problem, fit)
    return _site(population, problem, algorithm, trainer, memories)


def algorithm_of(config: Config) -> Algorithm:
    """The algorithm of a config, as its clients use it."""
    return _algorithm(config, 1)[1]


def site_of(config: Config, dataset: Dataset, memories: Store) -> Site:
    """What answers the tasks of those of the config's clients whose data is here."""
    population = load_population(config, dataset)
    problem, _ = _problem(config, dataset, None)
    _, algorithm = _algorithm(config, len(population.clients))
    trainer, note = _trainer(config, problem, algorithm, population, None)
    log.info("%s", note)
    return _site(population, problem, algorithm, trainer, memories)


def _site(
    population: Population, problem: Problem, algorithm: Algorithm, trainer: Trainer, memories: Store
) -> Site:
    return Site(
        algorithm,
        trainer,
        lambda model, data: problem.measure(model, *data.test),
        holdings(population),
        memories,
        lambda client: population.sizes(client)[0],
    )


def load_dataset(config: Config, data_dir: Path | None = None) -> Dataset:
    """The data set that `[data]` names: a kind of DATASETS, or "file.py:function" giving one."""
    name = config.data["dataset"]
    options = {
        key: value for key, value in config.data.items() if key not in ("dataset", "partition", "holdout")
    }
    if ":" in name:
        made = parts.call(parts.load_object(name, "data.dataset", config.folder), options, "data")
        if isinstance(made, Dataset):
            return made
        train, test = made if isinstance(made, tuple) else (made, None)
        return from_torch(train, test, name=name)
    provided: dict[str, Any] = {"folders": data_folders(data_dir)}
    if name == "sites" and "test" in options:
        loader = {
            **parts.convert(options.pop("test"), dict[str, Any], "data.test"),
            "partition": {"kind": "iid"},
        }
        provided["test"] = load_dataset(replace(config, data=loader), data_dir)
    return parts.build(DATASETS, {"dataset": name, **options}, "data", provided, by="dataset")  # type: ignore[no-any-return]


def load_population(config: Config, dataset: Dataset) -> Population:
    """The data set dealt out to clients as `data.partition` says."""
    provided = {"examples": dataset.train, "key": derive(config.seed, "partition")}
    partition = parts.build(PARTITIONS, config.data["partition"], "data.partition", provided)
    return populate(dataset, partition, holdout=config.data["holdout"], key=derive(config.seed, "holdout"))


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain values, every default filled in; `load` reads it back as the same experiment."""
    out = to_dict(config)
    apart = ("partition", "holdout", *(["test"] if config.data["dataset"] == "sites" else []))
    loader = {name: value for name, value in config.data.items() if name not in apart}
    if ":" not in config.data["dataset"]:
        given = ("folders", *apart[2:])
        out["data"] = {**out["data"], **parts.resolve(DATASETS, loader, "data", given, by="dataset")}
    partition = parts.resolve(PARTITIONS, config.data["partition"], "data.partition", ("examples", "key"))
    out["data"] = {**out["data"], "partition": partition}
    if ":" not in config.model.get("kind", ":"):
        out["model"] = parts.resolve(MODELS, config.model, "model", ("input_shape", "outputs"))
    tables = {
        name: config.algorithm[name]
        for name in ("client", "server", "aggregator")
        if name in config.algorithm
    }
    rest = {name: value for name, value in config.algorithm.items() if name not in tables}
    server = tables.get("server", {})
    make, _ = parts.choose(ALGORITHMS, rest, "algorithm")
    if "local" in inspect.signature(make).parameters:
        client = {"optimizer": "sgd", **tables.get("client", {})}
        table: dict[str, Callable[..., Any]] = {"optimizer": OPTIMIZERS[client["optimizer"]], "steps": Local}
        named = {half: inspect.signature(make).parameters for half, make in table.items()}
        for half in table:
            mine = {
                name: value for name, value in client.items() if name in named[half] and name != "optimizer"
            }
            full = parts.resolve(table, {"kind": half, **mine}, "algorithm.client", ("optimizer",))
            client |= {name: value for name, value in full.items() if name != "kind"}
        tables["client"] = client
    if "server" in inspect.signature(make).parameters and server:
        tables["server"] = parts.resolve(
            OPTIMIZERS, {"optimizer": "sgd", **server}, "algorithm.server", by="optimizer"
        )
    given = ("population", "local", "server", "aggregator", *server)
    out["algorithm"] = {**parts.resolve(ALGORITHMS, rest, "algorithm", given), **tables}
    staleness = config.schedule.get("staleness")
    section = {name: value for name, value in config.schedule.items() if name != "staleness"}
    out["schedule"] = parts.resolve(
        SCHEDULES, section, "schedule", ("key", "size", "on_nan", "staleness", "pooled")
    )
    out["transforms"] = [
        parts.resolve(TRANSFORMS, each, f"transforms[{place}]")
        for place, each in enumerate(config.transforms)
    ]
    if staleness:
        out["schedule"]["staleness"] = parts.resolve(STALENESS, staleness, "schedule.staleness")
    return out


def _problem(config: Config, dataset: Dataset, model: nn.Module | None) -> tuple[Problem, Any]:
    if model is None:
        shape = {
            "input_shape": dataset.input_shape,
            "outputs": len(dataset.classes) if dataset.classes else 1,
        }
        kind, options = config.model["kind"], {k: v for k, v in config.model.items() if k != "kind"}
        with seeded(derive(config.seed, "model")):
            if ":" in kind:
                make = parts.load_object(kind, "model.kind", config.folder)
                given = {name: value for name, value in shape.items() if name not in options}
                model = parts.call(make, options, "model", given, kind)
            else:
                model = parts.build(MODELS, config.model, "model", shape)
    problem = Problem(model, dataset.task)
    return problem, problem.model()


def _dimension(config: Config, algorithm: Algorithm, initial: Any) -> int:
    """The numbers in an update, where that matters."""
    if not config.transforms:
        return 0
    return sum(leaf.numel() for leaf in trees.leaves(update_like(algorithm, algorithm.init(initial))))


def _algorithm(config: Config, population: int) -> tuple[Local, Algorithm]:
    local, algorithm = _plain(config, population)
    return local, transformed(algorithm, chain_of(config, population))


def _plain(config: Config, population: int) -> tuple[Local, Algorithm]:
    """The algorithm before its transforms."""
    section = dict(config.algorithm)
    make, _ = parts.choose(ALGORITHMS, section, "algorithm")
    named = inspect.signature(make).parameters
    client, server = dict(section.pop("client", {})), dict(section.pop("server", {}))
    provided: dict[str, Any] = {"population": population, "local": None, "server": None}
    if "local" in named:
        provided["local"] = local = _local(client)
    elif client:
        raise ConfigError(
            "algorithm.client: fedsgd's clients take no steps of their own",
            "set the step in algorithm.server",
        )
    if "server" in named:
        provided["server"] = _optimizer(server, "algorithm.server") if server else None
    else:
        section |= server  # fedadam's server table holds lr, beta1, ... of the algorithm itself
    if "aggregator" in section:
        chosen = section.pop("aggregator")
        if "aggregator" not in named:
            raise ConfigError(f"algorithm.aggregator: {section['kind']} brings its own", "leave it out")
        if chosen != {"kind": "mean"}:
            provided["aggregator"] = parts.build(AGGREGATORS, chosen, "algorithm.aggregator")
    if "local" not in named:  # what the baselines train with instead
        server_side = provided["server"] or OPTIMIZERS["sgd"](0.1)
        local = Local(optimizer=lambda lr: server_side, batch_size=None)
    return local, parts.build(ALGORITHMS, section, "algorithm", provided)


def _local(client: dict[str, Any]) -> Local:
    name = client.pop("optimizer", "sgd")
    make, _ = parts.choose(OPTIMIZERS, {"optimizer": name}, "algorithm.client", "optimizer")
    options, steps = parts.split(
        [make, Local], client, "algorithm.client", ("optimizer",), label=f"a client with {name}"
    )
    lr = options.pop("lr", Local().lr)
    make(lr, **options)  # refuses bad values now
    return parts.call(Local, {**steps, "lr": lr}, "algorithm.client", {"optimizer": partial(make, **options)})  # type: ignore[no-any-return]


def _optimizer(section: dict[str, Any], where: str) -> Any:
    return parts.build(OPTIMIZERS, {"optimizer": "sgd", **section}, where, by="optimizer")


def _schedule(config: Config, population: Population) -> Any:
    section = dict(config.schedule)
    provided: dict[str, Any] = {
        "key": derive(config.seed, "schedule"),
        "size": lambda client: float(population.sizes(client)[0]),
        "on_nan": config.run["on_nan"],
        "pooled": True,
    }
    if isinstance(section.get("staleness"), Mapping):
        provided["staleness"] = parts.build(STALENESS, section.pop("staleness"), "schedule.staleness")
    return parts.build(SCHEDULES, section, "schedule", provided)


def _trainer(
    config: Config,
    problem: Problem,
    algorithm: Algorithm,
    population: Population,
    fit: Callable[..., Any] | None,
    trains: bool = True,
) -> tuple[Any, str]:
    settings = config.backend["trainer"]
    section = {"kind": settings} if isinstance(settings, str) else dict(settings)
    kind = "custom" if fit is not None else section.pop("kind", "auto")
    if kind not in TRAINERS:
        guess = parts.nearest(str(kind), TRAINERS)
        raise ConfigError(
            f"backend.trainer = {kind!r}: no such trainer",
            (f"did you mean {guess!r}? " if guess else "") + f"there are: {', '.join(TRAINERS)}",
        )
    if kind in ("custom", "loop"):
        told = {"custom": "your own fit", "loop": "one client after the other"}
        return _made(kind, config, problem, fit), f"trainer: {kind} ({told[kind]})"
    if not trains:
        return Elsewhere(), f"trainer: {kind}, as each site finds"
    trainer = _made("vectorised", config, problem, fit)
    assert isinstance(trainer, Vectorised)
    clients = [population.clients[0], population.clients[-1]]
    obstacle = trainer.obstacle(algorithm, [population.data(client) for client in clients])
    if not obstacle:
        return trainer, f"trainer: vectorised ({trainer.told()})"
    if kind == "vectorised":
        raise ConfigError(
            f"backend.trainer = 'vectorised': {obstacle[0]}", f'{obstacle[1]}; or set trainer = "loop"'
        )
    return _made("loop", config, problem, fit), f"trainer: loop, because {obstacle[0]} ({obstacle[1]})"


def _made(
    kind: str, config: Config, problem: Problem, fit: Callable[..., Any] | None
) -> Loop | Custom | Vectorised:
    seed, settings = derive(config.seed, "clients"), config.backend
    if kind == "custom":
        if fit is None:
            named = settings["trainer"].get("fit") if isinstance(settings["trainer"], Mapping) else None
            if named is None:
                raise ConfigError(
                    "backend.trainer: custom needs fit", 'trainer = { kind = "custom", fit = "train.py:fit" }'
                )
            fit = parts.load_object(named, "backend.trainer.fit", config.folder)
        return Custom(problem, seed, fit)
    if kind == "vectorised":
        options = {name: settings[name] for name in ("block", "compile", "precision")}
        return Vectorised(problem, seed, **options)
    return Loop(problem, seed)


def _test(population: Population) -> tuple[Tensor, Tensor]:
    dataset = population.dataset
    if dataset.test is not None:
        return dataset.prepare(dataset.test.x), dataset.test.y
    if dataset.remote:
        return dataset.prepare(dataset.train.x[:0]), dataset.train.y[:0]
    if isinstance(population.partition, Lazy):
        raise ConfigError(
            f"{dataset.name} has no test set, and its clients share rows, so none is held out from all",
            "use a data set with a test part",
        )
    test = population.pooled().test
    if not len(test[1]):
        raise ConfigError(
            f"{dataset.name} has no test set and data.holdout = {population.holdout} keeps none",
            "set data.holdout = 0.1, or give the data set a test part",
        )
    return test


def _refuse_pairs(made: Parts) -> None:
    """Refuse pairs of parts that cannot work together, with the reason and the way out."""
    algorithm, kind = made.config.algorithm, made.config.algorithm["kind"]
    waits = not isinstance(made.schedule, Buffered)
    if made.population.dataset.remote and (
        made.config.compare or getattr(made.schedule, "sampling", "") == "weighted"
    ):
        raise ConfigError(
            "data.dataset = 'sites': the server has no rows to train baselines on or to weigh clients by",
            'leave compare out, and use schedule.sampling = "uniform"',
        )
    if algorithm.get("weighting") == "client" and made.population.weight is None:
        raise ConfigError(
            "algorithm.weighting = 'client': this data names no weights",
            'name the column that holds them: data.weight = "..."',
        )
    if isinstance(made.trainer, Custom) and made.algorithm.client_work.gradient is not gradient:
        raise ConfigError(
            f"the custom trainer runs your own steps, so {kind} cannot change their gradients",
            "use fedavg or a FedOpt algorithm with it, or trainer = 'loop'",
        )
    if kind == "fedasync" and waits:
        raise ConfigError(
            "fedasync mixes every client's model in as it arrives; this schedule waits for others",
            'use schedule.kind = "asynchronous", or fedavg',
        )
    if kind == "scaffold" and not waits:
        raise ConfigError(
            "scaffold's control variates belong to one round; an asynchronous schedule mixes several",
            'use schedule.kind = "synchronous", or fedbuff',
        )
    if isinstance(made.schedule, Gossip):
        if kind in ("scaffold", "fedasync", "fedbuff"):
            raise ConfigError(f"{kind} needs a server; a gossip schedule has none", 'use "dpsgd" or "fedavg"')
        if "aggregator" in algorithm and algorithm["aggregator"].get("kind") != "mean":
            raise ConfigError(
                "algorithm.aggregator: gossip mixes each node with its neighbours; nobody sees all updates",
                "leave it out, or use a schedule with a server",
            )
    if kind == "dpsgd" and not isinstance(made.schedule, Gossip):
        raise ConfigError(
            "dpsgd has no server: its nodes mix with their neighbours",
            'use schedule.kind = "gossip", or fedavg',
        )
    if "krum" in str(algorithm.get("aggregator", "")):
        chosen = algorithm["aggregator"]
        need = 2 * chosen["byzantine"] + 3
        replies = made.schedule.buffer if not waits else _cohort(made)
        if replies < need:
            raise ConfigError(
                f"krum(byzantine={chosen['byzantine']}) needs {need} replies; the schedule gives {replies}",
                f"set schedule.{'cohort' if waits else 'buffer'} >= {need}, or lower byzantine",
            )


def _cohort(made: Parts) -> int:
    return share(made.schedule.cohort, len(made.population.clients), "schedule.cohort", "clients")
