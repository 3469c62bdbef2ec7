"""A server's runs: submit, stop, resume, delete; so many at once, the oldest first, each in its own thread.

What is to be done stands in the database, so a server that starts goes on with what another left: what was
queued, and what was running or interrupted when that one ended.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from coterie.core import ConfigError, CoterieError, Fenced, Interrupted, RunError
from coterie.experiment import code as unpacked
from coterie.experiment.assemble import Parts, assemble, resolved
from coterie.experiment.away import Away
from coterie.experiment.code import Environment
from coterie.experiment.config import Config, load
from coterie.experiment.ledger import reopened
from coterie.experiment.promise import refuse_uncalibrated
from coterie.experiment.records import Progress
from coterie.experiment.run import Session, logged
from coterie.experiment.served import Carrier, Served
from coterie.storage import Blob, Blobs, RunFolder, write_atomic
from coterie.storage.archive import Archive
from coterie.storage.database import Database, Run
from coterie.storage.files import make_folder

GOES_ON = ("queued", "running", "interrupted")
EXIT_CODES: Mapping[str, int] = {"finished": 0, "failed": 1, "stopped": 130, "interrupted": 130}
N = TypeVar("N", int, float)
log = logging.getLogger("coterie")
Connect = Callable[[Run, Parts, Iterator[tuple[float, str]]], Carrier]


class Quotas(NamedTuple):
    """What a run may use in all; None: as much as it likes."""

    rounds: int | None = None
    bytes: int | None = None  # up and down
    seconds: float | None = None  # of wall time, while it runs


UNLIMITED = Quotas()


class Queue:
    """The runs of the server that holds the database's lease, from its start to `close`.

    folder: where run folders and blobs lie. code: where relative paths of a config start. updates: where
    replies' tensors arrive. connect: makes a run's carrier (`served.Carrier`). home: fsspec URL under which
    blobs are kept too, for a standby on another machine. watch: told of every run's progress. ended: told a
    run's id and status when its thread ends.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        updates: Blobs,
        connect: Connect,
        *,
        at_once: int = 2,
        quotas: Quotas = UNLIMITED,
        home: str | None = None,
        data_dir: Path | None = None,
        code: Path = Path(),
        watch: Callable[[str, Progress], None] = lambda run, progress: None,
        ended: Callable[[str, str], None] = lambda run, status: None,
    ) -> None:
        self.database, self.folder, self.updates, self.connect = database, folder, updates, connect
        self.at_once, self.quotas, self.home, self.data_dir = at_once, quotas, home, data_dir
        self.code, self.watch, self.ended = code, watch, ended
        self.changed = threading.Condition()  # guards what follows; told when a run has ended
        self.places: dict[str, Served | None] = {}  # of the runs at work; None: still being assembled
        self.asked: dict[str, CoterieError] = {}  # how a run that has no place yet is to end
        self.unwritten: dict[str, tuple[str, str]] = {}  # how runs ended, when the database could not be told
        self.lost: CoterieError | None = None  # why not; this server must end
        self.closing = False
        self.unpacking = threading.Lock()

    def start(self) -> None:
        """Go on with all that a server left here before."""
        unpacked.tidy(self.folder / "code")
        with self.changed:
            for run in self.database.runs("running", "interrupted"):
                self.database.set_status(run.id, "queued")
            self._fill()

    def submit(
        self,
        config: str,
        *,
        code: bytes = b"",
        signer: str | None = None,
        quotas: Quotas = UNLIMITED,
        sites: Sequence[str] = (),
        check: Callable[[Parts], object] = lambda parts: None,
    ) -> str:
        """Queue a run of this config (TOML); its id. sites: who takes part. check: may refuse its parts too.

        code: the package that travels with it. Raises ConfigError or DataError, and nothing is queued, when
        the config cannot work or asks for more than the quotas (the stricter of these and the server's).
        """
        name, package = _config(config).name, hashlib.sha256(code).hexdigest() if code else ""
        id = f"{name}-{secrets.token_hex(4)}"
        try:
            if code:
                archive = self._archive(id)
                write_atomic(archive.blobs.path(package), code)
                archive.adopt(archive.blobs.path(package))
            with self._assembled(config, id, package) as parts:
                check(parts)
                resolved(parts.config)  # refuses what could not be written down
                quotas = self._allowed(quotas, parts.schedule.rounds)
        except BaseException:
            if code:
                self._archive(id).remove()
            raise
        digest = hashlib.sha256(config.encode()).hexdigest()
        folder, now = str(self.folder / "runs" / id), time.time()
        asked, places = quotas._asdict(), tuple(sites)
        run = Run(id, name, config, digest, signer, "queued", "", now, folder, asked, places, package)
        with self.changed:
            self.database.add_run(run)
            self._fill()
        return id

    def lend(self, run: Run) -> Blob:
        """Put the package of a run where sites fetch it."""
        archive = self._archive(run.id)
        archive.lend(run.code, self.updates)
        return Blob(run.code, archive.blobs.path(run.code).stat().st_size)

    def _allowed(self, quotas: Quotas, rounds: int) -> Quotas:
        allowed = self.quotas
        quotas = Quotas(
            _stricter(quotas.rounds, allowed.rounds),
            _stricter(quotas.bytes, allowed.bytes),
            _stricter(quotas.seconds, allowed.seconds),
        )
        if quotas.rounds is not None and rounds > quotas.rounds:
            raise ConfigError(
                f"schedule.rounds = {rounds}: this server allows {quotas.rounds}",
                "ask for fewer rounds, or the operator for more",
            )
        return quotas

    def stop(self, id: str) -> None:
        """Stop a run, which can be resumed. Raises ConfigError when it has ended already."""
        with self.changed:
            run = self.database.run(id)
            if id in self.places:
                self._end(id, Stopped(f"run {id} was stopped", f"resume {id}"))
            elif run.status in GOES_ON:
                self.database.set_status(id, "stopped")
            else:
                raise ConfigError(
                    f"run {id}: is {run.status}", "only what is queued or running can be stopped"
                )

    def resume(self, id: str) -> None:
        """Queue a run that was stopped or has failed. Raises ConfigError when it is neither.

        What was stopped goes on from its log. What has failed goes on from its last commit: its plan, told
        the same again, would fail again.
        """
        with self.changed:
            run = self.database.run(id)
            if id in self.places or run.status in ("queued", "finished"):
                raise ConfigError(f"run {id}: is {run.status}", "only what was stopped or failed can go on")
            if run.status == "failed":
                self.database.back_to(
                    id, max((version for version, _ in self.database.commits(id)), default=0)
                )
            self.database.set_status(id, "queued")
            self.unwritten.pop(id, None)
            self._fill()

    def delete(self, id: str) -> None:
        """Stop a run and remove all there is of it. A kill in the middle leaves a run to be deleted again."""
        run = self.database.run(id)
        with self.changed:
            self._end(id, Stopped(f"run {id} was deleted"))
            self.changed.wait_for(lambda: id not in self.places)
            self.database.set_status(id, "stopped")
            self._archive(id).remove()
            shutil.rmtree(run.folder, ignore_errors=True)
            self.database.delete_run(id)

    def wait(self, id: str, timeout: float | None = None) -> Run:
        """Wait until a run is neither queued nor at work, or for so many seconds; the run as it is then."""

        def ended() -> bool:
            return id not in self.places and (self.closing or self.database.run(id).status != "queued")

        with self.changed:
            self.changed.wait_for(ended, timeout)
            run = self.database.run(id)
            status, error = self.unwritten.get(id, (run.status, run.error))
        return run._replace(status=status, error=error)

    def close(self) -> None:
        """End all threads; their runs are "interrupted", and the next server goes on with them."""
        with self.changed:
            self.closing = True
            for id in self.places:
                self._end(id, Interrupted("the server ended", "it goes on when a server starts"))
            self.changed.wait_for(lambda: not self.places)
            self.changed.notify_all()

    def _end(self, id: str, error: CoterieError) -> None:
        if id in self.places:
            place = self.places[id]
            self.asked.setdefault(id, error)
            if place is not None:
                place.end(error)

    def _fill(self) -> None:
        """Start the oldest that wait, up to so many."""
        for run in self.database.runs("queued"):
            if self.closing or len(self.places) >= self.at_once:
                return
            if run.id not in self.places:
                self.places[run.id] = None
                threading.Thread(target=self._work, args=(run,), name=f"run {run.id}").start()

    def _work(self, run: Run) -> None:
        """A run's thread."""
        status, error = "finished", ""
        try:
            self.database.set_status(run.id, "running")
            self._run(run)
        except Fenced as fenced:
            status = ""  # the successor's to say
            log.warning("run %s: %s", run.id, fenced.args[0])
        except Stopped as stopped:
            status, error = "stopped", str(stopped.args[0])
        except Interrupted as interrupted:
            status, error = "interrupted", str(interrupted.args[0])
        except CoterieError as failure:
            status, error = "failed", str(failure)
        except BaseException as bug:
            log.exception("run %s", run.id)
            status, error = "failed", f"{type(bug).__name__}: {bug}"
        with self.changed:
            if status not in ("", "finished"):  # which stands there already
                try:
                    self.database.set_status(run.id, status, error)
                except CoterieError as lost:  # for the database it is "running", so the next server goes on
                    self.unwritten[run.id], self.lost = (status, error), lost
                    log.warning("run %s is %s, which could not be written: %s", run.id, status, lost)
                    status = "interrupted"
            del self.places[run.id]
            self.asked.pop(run.id, None)
            with suppress(CoterieError):
                self._fill()
            self.changed.notify_all()
        if status:
            self.ended(run.id, status)

    def _run(self, run: Run) -> None:
        with self._assembled(run.config, run.id, run.code) as parts:
            self._session(run, parts)

    def _session(self, run: Run, parts: Parts) -> None:
        folder = RunFolder(Path(run.folder))
        torch.set_num_threads(parts.config.run["threads"])
        make_folder(folder.path)
        with folder.lock(wait=True), logged(folder.log, threading.get_ident()):
            # a server that takes over may have no folder yet; nothing leaves before the database has it
            parts = reopened(parts, folder.path, begun=False)
            place = Served(
                parts, folder, self.database, run.id, self._archive(run.id), self.updates,
                lambda replay: self.connect(run, parts, replay), run.code,
            )  # fmt: skip
            with self.changed:
                self.places[run.id] = place
                if run.id in self.asked:
                    place.end(self.asked[run.id])
            folder.write_config(resolved(parts.config))
            quotas = Quotas(**run.quotas)

            def watch(progress: Progress) -> None:
                used = progress.bytes_up + progress.bytes_down
                if quotas.bytes is not None and used > quotas.bytes:
                    place.end(_exceeded(f"{used} bytes", f"{quotas.bytes} bytes"))
                self.watch(run.id, progress)

            session = Session(parts, folder, place, watch, place.stopped)
            allowed = threading.TIMEOUT_MAX if quotas.seconds is None else quotas.seconds
            left = max(allowed - session.before["total"], 0.0)
            timer = threading.Timer(left, place.end, [_exceeded(f"{allowed:g} s", f"{allowed:g} s")])
            timer.daemon = True
            timer.start()
            try:
                session.run()
            finally:
                timer.cancel()
        self.database.set_status(run.id, "finished")
        place.tidy()

    @contextmanager
    def _assembled(self, text: str, id: str, package: str) -> Iterator[Parts]:
        """The parts of a config; what its package brings is in a process of its own."""
        config = replace(_config(text), folder=self.code)
        away: AbstractContextManager[Away | None] = nullcontext()
        if package:
            away = Away(config, self._unpacked(id, package), self.folder / "code", self.data_dir)
        with away as model:
            parts = assemble(config, data_dir=self.data_dir, away=model, trains=False)
            refuse_uncalibrated(config, parts.promise)
            yield parts

    def _unpacked(self, id: str, package: str) -> Environment:
        folder = self.folder / "code"
        with self.unpacking:
            if ready := unpacked.prepared(folder, package):
                return ready
            archive = self._archive(id)
            archive.lend(package, archive.blobs)  # fetches what is at home only
            used = [run.code for run in self.database.runs(*GOES_ON)]
            return unpacked.prepare(folder, archive.blobs.path(package), used)

    def _archive(self, id: str) -> Archive:
        return Archive(self.folder / "blobs" / id, None if self.home is None else f"{self.home}/{id}")


class Stopped(Interrupted):
    """An operator stopped the run."""


def _config(text: str) -> Config:
    try:
        return load(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config is no TOML: {error}") from None


def _stricter(a: N | None, b: N | None) -> N | None:
    return b if a is None else a if b is None else min(a, b)


def _exceeded(used: str, allowed: str) -> RunError:
    return RunError(f"quota: the run used {used}, and may use {allowed}", "ask the operator for more")
