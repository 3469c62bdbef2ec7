"""Run a config at every combination of some values, several runs at a time, and put the results in one table.

A sweep's folder holds a run folder for each cell, and sweep.json, sweep.csv, cells.csv and sweep.html.
What the cells are is in `grid`, a cell's process in `cell`, the arithmetic in `estimates`, the page in
`sweep_page`.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, CoterieError, Interrupted, RunError
from coterie.data import Dataset
from coterie.experiment.assemble import assemble, load_dataset
from coterie.experiment.config import Config, to_toml
from coterie.experiment.estimates import estimate
from coterie.experiment.grid import Cell, Grid, Source, base, cells, describe
from coterie.experiment.numbers import number
from coterie.storage import RunFolder, write_atomic

GRACE = 5.0  # seconds that a cell has to end in when it is told to
MEASURES = ("accuracy", "loss", "client_mean", "worst_decile", "bytes", "seconds")
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """A moment of a sweep; `done` of `cells` have ended, well or not.

    status: "checking" (no cell yet), "found" (it had finished before), "running", "finished" or "failed".
    """

    status: str
    cells: int
    done: int
    jobs: int = 1
    cell: str = ""
    round: int = 0
    rounds: int = 0
    within: float = 0.0  # the part of the round that is done
    loss: float | None = None
    accuracy: float | None = None
    seconds: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What a sweep ended with; `to_json()` is sweep.json, and `pandas.DataFrame(result.cells)` works.

    axes: {path: values}, seeds included. metric: what the best row is chosen by, "accuracy" or "loss".
    rows: one record for each combination of the axes but the seed: their values, `seeds` that finished `of`
    so many, the mean over them of each measure and, as `<measure>_ci`, the half-width of its 95 % confidence
    interval (None for one seed), `best`, `errors`.
    cells: one record a run: values, folder's name, status, rounds, the measures, model_digest, error.
    The measures are accuracy, loss, client_mean and worst_decile (the metric over clients), bytes, seconds.
    """

    folder: Path
    name: str
    metric: str
    base: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    rows: Sequence[Record]
    cells: Sequence[Record]

    @property
    def failed(self) -> int:
        """How many cells have no result."""
        return sum(cell["status"] != "finished" for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """The object in sweep.json."""
        return {name: getattr(self, name) for name in ("name", "metric", "base", "axes", "rows", "cells")}


Watch = Callable[[SweepProgress], None]


def sweep(
    config: Source,
    grid: Grid = (),
    *,
    seeds: int | Sequence[int] | None = None,
    out: Path | str | None = None,
    jobs: int | None = None,
    overrides: Sequence[str] = (),
    data_dir: Path | str | None = None,
    watch: Watch | None = None,
) -> SweepResult:
    """Run every combination of the grid and the seeds, each in a process of its own; finish what is missing.

    grid, seeds, overrides: see `grid.cells`. out: the sweep's folder (None: sweeps/<name>); cells that have
    finished there are kept, half-finished ones resumed. jobs: runs at a time (None: as many as the cores
    can hold). watch: called with SweepProgress. A cell that fails does not stop the others.
    Raises ConfigError or DataError before anything runs, Interrupted on Ctrl-C; no process outlives this one.
    """
    todo = cells(config, grid, seeds, overrides)
    folder = Path("sweeps") / todo[0].config.name if out is None else Path(out)
    data = None if data_dir is None else Path(data_dir)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: must be >= 1", "leave it out for as many as the cores can hold")
    jobs = min(jobs or _affordable(todo), len(todo))
    _refuse_another(folder, todo)
    missing = [cell for cell in todo if not _finished(folder / cell.name)]
    tell, done = watch or (lambda progress: None), len(todo) - len(missing)
    tell(SweepProgress(status="checking", cells=len(todo), done=0, jobs=jobs))
    check(missing, data)
    with _locked(folder):
        _write(_collect(folder, todo, {}))
        for count, cell in enumerate((c for c in todo if c not in missing), start=1):
            tell(SweepProgress(status="found", cells=len(todo), done=count, jobs=jobs, cell=cell.name))
        errors: dict[str, str] = {}
        try:
            for event in _run_all(folder, missing, jobs, data):
                done += event["status"] != "running"
                if event["status"] == "failed":
                    errors[event["cell"]] = event["error"]
                tell(SweepProgress(cells=len(todo), done=done, jobs=jobs, **event))
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: {done} of {len(todo)} cells have ended",
                f"the same command goes on from there; the runs are in {folder}",
            ) from None
        result = _collect(folder, todo, errors)
        _write(result)
        from coterie.experiment import sweep_page  # noqa: PLC0415  its pictures take long to load

        sweep_page.write(result.folder, result.to_json())
    return result


def check(todo: Sequence[Cell], data_dir: Path | None = None) -> None:
    """Assemble every combination once, so that a bad value is known before anything runs.

    Raises ConfigError or DataError that names the combination. What only one seed meets is left to its run.
    """
    datasets: dict[str, Dataset] = {}
    seen: list[Config] = []
    for cell in todo:
        values = {path: value for path, value in cell.values.items() if path != "seed"}
        if (alike := replace(cell.config, seed=0)) in seen:
            continue
        seen.append(alike)
        loader = {k: v for k, v in cell.config.data.items() if k not in ("partition", "holdout")}
        try:
            if (key := repr(loader)) not in datasets:
                datasets = {key: load_dataset(cell.config, data_dir)}  # only one is held in memory
            assemble(cell.config, data_dir=data_dir, dataset=datasets[key])
        except CoterieError as error:
            where = f" (in the cell {describe(values)})" if values else ""
            error.args = (f"{error.args[0]}{where}",)
            raise


def _affordable(todo: Sequence[Cell]) -> int:
    """How many runs the cores can hold, by the workers and the threads that each takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    taken = ((cell.config.run["threads"], cell.config.backend) for cell in todo)
    each = max(max(n, backend["threads"]) * (number(backend.get("workers")) or 1) for n, backend in taken)
    return max(1, int(cores // each))


def _refuse_another(folder: Path, todo: Sequence[Cell]) -> None:
    """Raise ConfigError when the folder holds something else, or a sweep of another config or other axes."""
    path = folder / "sweep.json"
    if not path.is_file():
        inside = folder.iterdir() if folder.is_dir() else (folder,) * folder.exists()
        if not all(each.name == "lock" or each.suffix == ".tmp" for each in inside):
            raise ConfigError(f"--out {folder}: not an empty folder, nor a sweep's", "name another folder")
        return
    elsewhere = "name another folder with --out; more values or seeds of the same axes may be added"
    try:
        state = json.loads(path.read_text("utf-8"))
        was, axes = dict(state["base"]), list(state["axes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}", "remove it; the runs beside it are kept") from None
    if axes != list(todo[0].values):
        raise ConfigError(
            f"--out {folder}: holds a sweep over {', '.join(axes)}; this one is over "
            f"{', '.join(todo[0].values)}",
            elsewhere,
        )
    if (difference := _difference(was, base(todo[0]))) is not None:
        raise ConfigError(f"--out {folder}: holds a sweep of another config: {difference}", elsewhere)


def _difference(was: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str | None:
    """The first key that differs, with both values; None when none does."""
    for key in {**was, **now}:
        then, new = was.get(key), now.get(key)
        if then != new:
            if isinstance(then, dict) and isinstance(new, dict):
                return _difference(then, new, f"{where}{key}.")
            return f"{where}{key} was {then!r}, now it is {new!r}"
    return None


def _finished(folder: Path) -> bool:
    if not (folder / "result.json").is_file():
        return False
    result = RunFolder(folder).result()
    return isinstance(result, dict) and result.get("status") == "finished"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only sweep in this folder. Raises RunError when another process is."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is at this sweep", "wait for it, or stop it") from None
        yield


class _Child:
    """A cell's process, and what it has said so far."""

    def __init__(self, folder: Path, cell: Cell, data_dir: Path | None) -> None:
        self.cell, self.folder = cell, folder / cell.name
        self.folder.mkdir(exist_ok=True)
        self.rest, self.said = b"", {"error": ""}
        with (self.folder / "run.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "coterie.experiment.cell", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the sweep, which ends its cells
            )
        order = {
            "config": to_toml(cell.config),
            "folder": str(cell.config.folder),
            "data_dir": None if data_dir is None else str(data_dir),
            "path": sys.path,
        }
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        with suppress(BrokenPipeError):  # it has died already: its end tells
            self.stdin.write(json.dumps(order).encode() + b"\n")
            self.stdin.flush()

    def read(self) -> Iterator[Record]:
        """The messages that have come; after the last one, how it ended."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.said |= message
            if "round" in message:
                within = message["done"] / message["total"] if message["total"] else 0.0
                yield {"status": "running", "within": within, **self._shared()}
        if not data:
            code = self.process.wait()
            ended = _finished(self.folder)
            error = "" if ended else self.said["error"] or _died(code, self.folder)
            seconds = _read(self.folder).seconds() if ended else None
            status = "finished" if ended else "failed"
            yield {"status": status, "error": error, "seconds": seconds, **self._shared()}

    def kill(self, how: signal.Signals) -> None:
        """Send the signal to the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)

    def close(self) -> None:
        """Close the pipes; the process has ended or is to end."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()

    def _shared(self) -> Record:
        told = {name: self.said.get(name) for name in ("round", "rounds", "loss", "accuracy")}
        return {
            "cell": self.cell.name,
            **told,
            "round": told["round"] or 0,
            "rounds": told["rounds"] or 0,
        }


def _run_all(folder: Path, todo: Sequence[Cell], jobs: int, data_dir: Path | None) -> Iterator[Record]:
    """Run the cells, `jobs` at a time, and yield what each tells. Leaves no process, however it is left."""
    waiting, running = list(todo), set[_Child]()
    with selectors.DefaultSelector() as ready:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    child = _Child(folder, waiting.pop(0), data_dir)
                    running.add(child)
                    ready.register(child.stdout, selectors.EVENT_READ, child)
                for key, _ in ready.select():
                    child = key.data
                    for event in child.read():
                        if event["status"] != "running":
                            ready.unregister(child.stdout)
                            child.close()
                            running.remove(child)
                        yield event
        finally:
            for child in running:
                child.kill(signal.SIGTERM)
            for child in running:
                try:
                    child.process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    child.kill(signal.SIGKILL)
                    child.process.wait()
                child.close()


def _died(code: int, folder: Path) -> str:
    log = f"{folder / 'run.log'} may say more"
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}; {log}"
    return f"ended with exit code {code}; {log}"


def _read(folder: Path) -> Any:
    from coterie.experiment import report  # noqa: PLC0415  its pictures take long to load

    return report.read(folder)


def _collect(folder: Path, todo: Sequence[Cell], errors: Mapping[str, str]) -> SweepResult:
    """Read what the cells' folders hold."""
    runs = {cell.name: _read(folder / cell.name) for cell in todo if _finished(folder / cell.name)}
    metric = next((run.metric for run in runs.values()), "accuracy")
    records: list[Record] = []
    for cell in todo:
        record: Record = {**cell.values, "cell": cell.name, "status": "missing"}
        if (run := runs.get(cell.name)) is not None:
            spread = run.result.get("clients") or {}
            record |= {"status": "finished", "rounds": run.result.get("rounds")}
            record |= {name: run.final(name) for name in ("accuracy", "loss")}
            record |= {"client_mean": number(spread.get(f"{metric}_mean"))}
            record |= {"worst_decile": run.worst_decile()}
            record |= {"bytes": run.bytes("up") + run.bytes("down"), "seconds": run.seconds()}
            record |= {"model_digest": run.result.get("model_digest")}
        elif cell.name in errors:
            record |= {"status": "failed", "error": errors[cell.name]}
        records.append(record)
    axes = {path: _unique([cell.values[path] for cell in todo]) for path in todo[0].values}
    return SweepResult(
        folder=folder,
        name=todo[0].config.name,
        metric=metric,
        base=base(todo[0]),
        axes=axes,
        rows=tabulate(records, [path for path in axes if path != "seed"], metric),
        cells=records,
    )


def tabulate(records: Sequence[Record], axes: Sequence[str], metric: str) -> list[Record]:
    """A row for each combination of the axes' values, in the order they come in: see SweepResult."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps([record[path] for path in axes], default=str), []).append(record)
    rows = []
    for group in groups.values():
        finished = [record for record in group if record["status"] == "finished"]
        row: Record = {path: group[0][path] for path in axes} | {"seeds": len(finished), "of": len(group)}
        for name in MEASURES:
            found = estimate([record[name] for record in finished if record[name] is not None])
            row |= {name: found.mean if found else None, f"{name}_ci": found.half if found else None}
        row["errors"] = list(dict.fromkeys(r["error"] for r in group if r.get("error")))
        rows.append(row)
    known = [row[metric] for row in rows if row[metric] is not None]
    best = (max if metric == "accuracy" else min)(known, default=None)
    for row in rows:
        row["best"] = len(known) > 1 and row[metric] == best
    return rows


def _write(result: SweepResult) -> None:
    text = json.dumps(result.to_json(), indent=1, default=str)
    write_atomic(result.folder / "sweep.json", text.encode() + b"\n")


def _unique(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
