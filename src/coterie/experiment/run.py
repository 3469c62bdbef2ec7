"""Run an experiment: assemble, drive the plan, write the folder, compare with the baselines, report."""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from coterie.core import (
    Commit,
    ConfigError,
    CoterieError,
    Event,
    Fenced,
    Fold,
    Interrupted,
    Lost,
    Reply,
    RunError,
    Task,
    native,
    run_sync,
    trees,
)
from coterie.data import Dataset, describe, spread
from coterie.experiment import baselines
from coterie.experiment.assemble import Parts, assemble, resolved
from coterie.experiment.away import Away
from coterie.experiment.config import Config, load
from coterie.experiment.ledger import closed, reopened
from coterie.experiment.numbers import worst_decile
from coterie.experiment.place import Here, Kept, Place
from coterie.experiment.promise import told
from coterie.experiment.records import Progress, Result
from coterie.experiment.tensorboard import board
from coterie.storage import RunFolder, write_atomic
from coterie.trainers import Vectorised

SHOWN = 1000  # clients listed one by one in clients.json
FREE_ON_RESUME = (
    "rounds",
    "quorum",
    "deadline",
)  # of [schedule]: may differ between a run and its resumption
Watch = Callable[[Progress], None]
log = logging.getLogger("coterie")


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    out: Path | str | None = None,
    data_dir: Path | str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    fit: Callable[..., Any] | None = None,
) -> Result:
    """Run an experiment to its end and return its result; everything is written to a run folder.

    config: a Config, a dict with the same names, or the path of a TOML file. out: the run folder (None:
    runs/<name>-<n>). resume: go on from the last checkpoint of `out`, or of the newest run of that name; a
    run that was killed before it had begun, or never started, starts.
    watch: called with Progress at every client and round. stop: asked after every client; True interrupts.
    model, dataset, fit: objects to use instead of what the config names.
    Raises ConfigError or DataError before anything is written, RunError when the run fails, Interrupted.
    """
    if isinstance(config, Mapping):
        config = _naming({"data": {}, **config}, model, dataset)
    if not isinstance(config, Config):
        config = load(config)
    parts_of = {"model": model, "dataset": dataset, "fit": fit}
    folder_out, folder_data = (Path(path) if path is not None else None for path in (out, data_dir))
    with _threads(config.run["threads"], config.backend["threads"]):
        parts = assemble(config, data_dir=folder_data, **parts_of)  # type: ignore[arg-type]
        if parts.population.dataset.remote:
            raise ConfigError(
                "data.dataset = 'sites': the rows lie at sites, there is nothing to train on here",
                "submit it to their server: coterie submit CONFIG --server HOST:PORT",
            )
        folder = _reopen(config, folder_out) if resume else None
        begun = folder is not None
        folder = folder or RunFolder.create(None, config.name, folder_out)
        with folder.lock(), logged(folder.log):
            parts = reopened(parts, folder.path, begun=begun)
            folder.write_config(resolved(config))
            place = Here(parts, folder)
            session = Session(parts, folder, place, watch or (lambda progress: None), stop or (lambda: False))
            return run_sync(session.run)


class Session:
    """One stretch of a run, from its start or a checkpoint to its end, a failure or an interruption."""

    def __init__(
        self, parts: Parts, folder: RunFolder, place: Place, watch: Watch, stop: Callable[[], bool]
    ) -> None:
        self.parts, self.folder, self.place, self.watch, self.stop = parts, folder, place, watch, stop
        settings = parts.config.run
        self.started = time.perf_counter()
        kept = place.open(self._worked)
        if kept is None:
            kept = Kept(0, parts.algorithm.init(parts.initial), None, {"total": 0.0, "train": 0.0})
        self.version, self.state, self.resume, self.before = kept
        self.first, self.now = self.version, 0.0
        self.rows: list[Mapping[str, Any]] = []
        self.totals = dict.fromkeys(("samples", "lost", "up", "down"), 0)
        for row in folder.rows():
            self._count(row)
        self.done = 0  # clients, in this round
        self.board = board(folder.path, self.version) if settings["tensorboard"] else None

    @property
    def rounds(self) -> int:
        """How many rounds the whole run has."""
        return int(self.parts.schedule.rounds)

    def run(self) -> Result:
        """Drive the plan to its end; then evaluate the clients, train the baselines and write the report."""
        clients = self.parts.population.clients
        self._tell(note=self.parts.note)
        try:
            if self.version < self.rounds:
                plan = self.parts.schedule(self.parts.algorithm, self.state, clients, self.resume)
                with _settled():
                    self.place.drive(plan, self._commit, self._event)
            by_client = self._evaluate_clients()
            compared = self._baselines()
        except Fenced:
            raise  # the folder may be the successor's already
        except CoterieError as error:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            with suppress(RunError, OSError):  # a full disk: what went wrong first is what to tell
                self._finish(status, {}, {}, str(error))
            raise
        finally:
            self.place.close()
        promised = self.parts.promise
        short = promised is not None and promised.rounds < promised.wanted
        return self._finish("budget spent" if short else "finished", by_client, compared)

    def seconds(self) -> dict[str, float]:
        """Wall time of the whole run so far, earlier stretches included."""
        return {
            "total": self.before["total"] + time.perf_counter() - self.started,
            "train": self.before["train"] + self.place.busy,
        }

    def _event(self, now: float, event: Event) -> None:
        self.now = now
        if isinstance(event, Lost):
            log.info("round %d: %s is lost: %s", event.task.round + 1, event.task.client, event.reason)
        elif isinstance(event, Reply) and event.task.kind == "fold":
            for reason in Fold(*event.up).lost:
                log.info("round %d: lost: %s", event.task.round + 1, reason)
            return
        self._worked(1)

    def _worked(self, clients: int) -> None:
        self.done += clients
        self._tell()
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop():
            where = f"in round {self.version + 1} of {self.rounds}"
            if self.version >= self.rounds:
                where = "after the last round, before all was compared"
            raise Interrupted(
                f"stopped {where}; round {self.version} is kept",
                f"go on with --out {self.folder.path} --resume",
            )

    def _commit(self, commit: Commit) -> None:
        """Write what a kill at any later moment must not lose, in the order that allows one at any moment."""
        self.version, self.state, self.resume, self.done = commit.version, commit.state, commit.resume, 0
        last = commit.version >= self.rounds
        row = {"round": commit.version, "version": commit.version, "time": self.now}
        due = last or commit.version % self.parts.config.run["evaluate_every"] == 0
        if due and len(self.parts.test[1]):  # a server may have no rows at all
            measured = self.parts.problem.measure(commit.state["model"], *self.parts.test)
            row |= {name: value for name, value in measured.items() if name != "count"}
        row |= {"seconds": self.seconds()["total"], **commit.metrics}
        self.place.commit(commit, row, self._append, self.seconds)
        self._tell()

    def _append(self, row: Mapping[str, Any]) -> None:
        self.folder.append(row)
        self._count(row)
        if self.board is not None:
            self.board(row)

    def _count(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        for name, value in (
            ("samples", row["samples"]),
            ("lost", row["clients"]["lost"]),
            *row["bytes"].items(),
        ):
            self.totals[name] += value

    def _tell(self, note: str = "") -> None:
        """Report progress."""
        row = self.rows[-1] if self.rows else {}
        clients, seconds = row.get("clients", {}), self.seconds()["total"]
        made = self.version - self.first
        measured = self._measured()
        self.watch(
            Progress(
                folder=self.folder.path,
                round=self.version,
                rounds=self.rounds,
                loss=measured.get("loss"),
                accuracy=measured.get("accuracy"),
                train_loss=row.get("train_loss"),
                asked=clients.get("asked", 0),
                answered=clients.get("answered", 0),
                lost=self.totals["lost"],
                bytes_up=self.totals["up"],
                bytes_down=self.totals["down"],
                seconds=seconds,
                eta=(seconds - self.before["total"]) / made * (self.rounds - self.version) if made else None,
                note=note,
                done=self.done,
                total=max(self.done, self.place.asked) if self.done else 0,
            )
        )

    def _measured(self) -> dict[str, Any]:
        """The newest row with an evaluation."""
        return next((row for row in reversed(self.rows) if "loss" in row), {})

    def _note(self, text: str) -> None:
        self._tell(note=text)
        self._check_stop()

    def _evaluate_clients(self) -> dict[str, dict[str, float]]:
        """Clients measure the final model on their own test rows, as a task like any other."""
        if self.parts.promise is not None:
            return {}  # withheld: their own test would tell of their data
        wanted, people = self.parts.config.run["evaluate_clients"], self.parts.population
        chosen = people.clients if wanted is True else spread(people.clients, int(wanted))
        holders = [client for client in chosen if people.dataset.remote or people.sizes(client)[1]]
        down, ids = {"model": self.state["model"]}, itertools.count(self.resume["next"])
        tasks = [Task(next(ids), c, self.version, self.version, down, "evaluate") for c in holders]
        replies = self.place.ask(tasks, lambda now, event: self._check_stop())
        return {client: dict(replies[client].metrics) for client in holders if client in replies}

    def _baselines(self) -> dict[str, Any]:
        wanted, samples = self.parts.config.compare, self.totals["samples"]
        made: dict[str, Any] = {}
        away = self.parts.problem if isinstance(self.parts.problem, Away) else None
        for name, train in baselines.BASELINES.items():
            if name in wanted:
                given = (samples, self.rounds, self._note)
                made[name] = away.baseline(name, *given) if away else train(self.parts, *given)
        return made

    def _finish(
        self, status: str, by_client: dict[str, dict[str, float]], compared: dict[str, Any], error: str = ""
    ) -> Result:
        """Write result.json, clients.json, the model and the report."""
        config, model = self.parts.config, self.state["model"]
        measured = self._measured()
        result = Result(
            folder=self.folder.path,
            name=config.name,
            seed=config.seed,
            task=self.parts.problem.task,
            rounds=self.version,
            status=status,
            final={name: measured[name] for name in ("loss", "accuracy") if name in measured},
            clients=_spread(by_client) if by_client else None,
            baselines=compared,
            bytes={way: self.totals[way] for way in ("up", "down")},
            seconds=self.seconds(),
            trainer=_told(self.parts.trainer),
            model_digest=trees.digest(model),
            privacy=told(self.parts.promise, self.version),
            error=error or None,
            model=model,
        )
        write_atomic(self.folder.path / "model.safetensors", save({**model["params"], **model["buffers"]}))
        self.folder.write_clients(_clients(self.parts, by_client, compared))
        self.folder.write_result(result.to_json())
        if status != "failed":  # a failure may have been in the middle of a commit
            closed(self.parts.promise, self.folder.path)
        from coterie.experiment import report  # noqa: PLC0415  its pictures take long to load

        report.write(self.folder.path)
        return result


def _told(trainer: Any) -> dict[str, Any]:
    """What a result says of its trainer."""
    if not isinstance(trainer, Vectorised):
        return {"kind": trainer.name}
    return {
        "kind": trainer.name,
        "kernels": native.library() is not None,
        "layers": trainer.paths,
        "compile_seconds": trainer.compile_seconds,
    }


def _naming(config: Mapping[str, Any], model: nn.Module | None, dataset: Dataset | None) -> dict[str, Any]:
    """Say in the config what was given as an object."""
    named = dict(config)
    if model is not None:
        named["model"] = {"kind": f"python:{type(model).__name__}"}
    if dataset is not None:
        named["data"] = {**config["data"], "dataset": f"python:{dataset.name}"}
    return named


def _spread(by_client: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over clients, and mean over the worst tenth of them."""
    spread: dict[str, float] = {}
    for name in ("accuracy", "loss"):
        values = [measured[name] for measured in by_client.values() if name in measured]
        if values:
            spread[f"{name}_mean"] = sum(values) / len(values)
            spread[f"{name}_worst_decile"] = worst_decile(values, name)
    return spread


def _clients(
    parts: Parts, by_client: dict[str, dict[str, float]], compared: dict[str, Any]
) -> dict[str, Any]:
    """What clients.json holds; under client-level privacy, nothing of any client."""
    if parts.promise is not None and parts.promise.noise["protected"]:
        return {"withheld": "client-level privacy", "labels": [], "of": len(parts.population.clients)}
    population = parts.population
    facts = describe(population.dataset.train, population.partition, population.dataset.classes)
    alone = compared.get("local_only", {}).get("own_accuracies", {})
    place = {client: index for index, client in enumerate(facts.clients)}
    shown = spread(facts.clients, SHOWN) if facts.among > len(facts.clients) else facts.clients[:SHOWN]
    return {
        "labels": list(facts.labels),
        "of": facts.among,
        "clients": [
            {
                "client": client,
                "train": population.sizes(client)[0],
                "test": population.sizes(client)[1],
                "labels": facts.counts[place[client]].tolist(),
                "accuracy": by_client.get(client, {}).get("accuracy"),
                "loss": by_client.get(client, {}).get("loss"),
                "local_accuracy": alone.get(client),
            }
            for client in shown
        ],
        "distance": {"jensen_shannon": facts.mean_jensen_shannon, "earth_mover": facts.mean_earth_mover},
        "sizes": {"min": facts.smallest, "median": facts.median, "max": facts.largest},
    }


def _reopen(config: Config, out: Path | None) -> RunFolder | None:
    """The folder to resume, or None when no such run has begun. Its config must be this one's, nearly."""
    folder = RunFolder.latest(None, config.name) if out is None else RunFolder.begun(out)
    if folder is None:
        return None
    was, now = _fixed(folder.config()), _fixed(resolved(config))
    if was != now:
        section = next(name for name in {**was, **now} if was.get(name) != now.get(name))
        raise ConfigError(
            f"--resume {folder.path}: [{section}] is not what the run was started with: "
            f"{was.get(section)!r} then, {now.get(section)!r} now",
            f"resume with the run's own config, {folder.path / 'config.toml'}; [run], compare and "
            f"schedule.{', schedule.'.join(FREE_ON_RESUME)} may differ",
        )
    return folder


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    fixed = {name: value for name, value in config.items() if name not in ("run", "compare")}
    schedule = {name: value for name, value in fixed["schedule"].items() if name not in FREE_ON_RESUME}
    backend = {name: fixed["backend"].get(name) for name in ("trainer", "block", "compile", "precision")}
    return {**fixed, "schedule": schedule, "backend": backend}


@contextmanager
def _threads(count: int, of_kernels: int) -> Iterator[None]:
    """Law 1 holds for a fixed number of torch's threads; the process's own settings come back afterwards."""
    before, before_kernels = torch.get_num_threads(), native.set_threads(of_kernels)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        native.set_threads(before_kernels)


@contextmanager
def _settled() -> Iterator[None]:
    """Spare what exists now, most of it torch's, from the garbage collector: 0.1 s each time."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def logged(path: Path, thread: int | None = None) -> Iterator[None]:
    """Send the library's log to the run's file as well; thread: only what this one says."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if thread is not None:
        handler.addFilter(lambda record: record.thread == thread)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        if thread is None:  # else others may still listen
            log.setLevel(level)
        handler.close()
