"""What a server does while it holds the lease: for sites by its hub, for operators as their desk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import queue
import threading
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from coterie import security
from coterie.backends import telemetry
from coterie.backends.network import Hub, NetworkBackend, RunOpened, Server, operators
from coterie.backends.spans import RunTrace
from coterie.core import ClientId, Task, Tree, trees
from coterie.core.errors import ConfigError, CoterieError
from coterie.core.transforms import encode, update_like
from coterie.experiment.assemble import Parts
from coterie.experiment.queue import Queue, Quotas
from coterie.experiment.records import Progress
from coterie.experiment.renewal import Current, keep_renewed
from coterie.storage import Blobs, Ledger
from coterie.storage.database import Database, Run
from coterie.storage.register import Register

SPARE = 1 << 20  # bytes that an update may have more than its tensors
FILES = (
    "result.json",
    "report.html",
    "metrics.jsonl",
    "config.toml",
    "clients.json",
    "model.safetensors",
    "run.log",
)
INSECURE = (
    "--insecure: nothing is encrypted, so whoever is on the way reads and changes models and updates; nobody "
    "shows a certificate, so whoever reaches this port may be any site or operator; neither configs nor "
    "replies are signed, and anybody can write a ledger like this one's. For trials on one machine only."
)
log = logging.getLogger("coterie")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a server is set up; `coterie server --help` explains each."""

    home: Path
    listen: str = "127.0.0.1:7443"
    enrol: str | None = None
    keys: Path | None = None
    authority: Path | None = None
    database: str | None = None
    blobs: str | None = None
    metrics: str | None = None
    at_once: int = 2
    silence: float = 120.0
    quotas: Quotas = field(default_factory=Quotas)
    data_dir: Path | None = None
    code: Path = Path()
    insecure: bool = False


class Office:
    """The working half of a server, while it holds the lease: an `operators.Desk`."""

    def __init__(self, options: Options, database: Database) -> None:
        self.options, self.database = options, database
        self.keys = options.keys or options.home
        self.current = None if options.insecure else Current(self.keys)
        self.mine = self.current() if self.current else None
        if self.mine is not None and self.mine.identity.role != "server":
            raise ConfigError(
                f"{self.keys}: the certificate is that of {self.mine.identity}", "a server's is needed"
            )
        signing = self.mine.signing_key if self.mine else hashlib.sha256(b"insecure").digest()
        self.ledger = Ledger(
            options.home / "ledger.jsonl", partial(security.sign, signing), security.public_of(signing)
        )
        folder = options.authority or options.home / "ca"
        self.register, self.files = Register(database), security.Files(folder)
        there = (folder / "ca.crt").exists()
        self.authority = security.Authority.open(folder, self.register) if there else None
        self.distrusted = (self.authority or self.register).revoked()
        self.loop = asyncio.get_running_loop()
        blobs = Blobs(options.home / "blobs")
        blobs.keep(())  # what runs still need is in their archives
        self.hub = Hub(
            blobs,
            silence=options.silence,
            verify=None if self.mine is None else _signed_by,
            ended=self._ended,
            tell=self._tell,
        )
        self.door = Server(
            self.hub,
            authorise=None if self.mine is None else self._site,
            renew=self._renew if self.authority else None,
            revoked=self._revoked,
            more=[operators.operator_service(self, self._operator)],
        )
        self.queue = Queue(
            database,
            options.home,
            self.hub.blobs,
            self._connect,
            at_once=options.at_once,
            quotas=options.quotas,
            home=options.blobs,
            data_dir=options.data_dir,
            code=options.code,
            watch=self._moved,
            ended=self._over,
        )
        self.notes: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self.clerk = threading.Thread(target=self._keep_ledger, name="ledger", daemon=True)
        self.clerk.start()
        self.latest: dict[str, Progress] = {}
        self.traces: dict[str, RunTrace] = {}
        self.watchers: dict[str, set[asyncio.Queue[dict[str, Any]]]] = {}

    async def open(self, stack: AsyncExitStack) -> int:
        """Listen, and go on with what another server left; return the port."""
        options = self.options
        if options.insecure:
            log.warning(INSECURE)
        port = await self.door.start(options.listen, self.current.door() if self.current else None)
        stack.push_async_callback(self.door.stop)
        if options.enrol:
            if self.authority is None or self.current is None:
                raise ConfigError("--enrol needs the authority's folder", "name it with --ca DIR")
            doorstep = grpc.aio.server(options=[("grpc.max_receive_message_length", 1 << 17)])
            doorstep.add_generic_rpc_handlers([operators.enrolment_service(self._enrol)])
            doorstep.add_secure_port(options.enrol, self.current.door(for_all=True))
            await doorstep.start()
            stack.push_async_callback(doorstep.stop, None)
        if self.authority and self.authority.signs and self.current:
            renewing = asyncio.ensure_future(keep_renewed(self.keys, self._renew_own))
            stack.callback(renewing.cancel)
        await asyncio.to_thread(self.queue.start)
        stack.push_async_callback(asyncio.to_thread, self.queue.close)
        self._count()
        return port

    def look(self) -> None:
        """Close what was opened with certificates that were revoked since, by whomever. From any thread.

        Raises what kept an update or the end of a run from being written: the disk is full, say.
        """
        if self.queue.lost:
            raise self.queue.lost
        now = (self.authority or self.register).revoked()
        fresh, self.distrusted = now - self.distrusted, now
        for serial in fresh:
            self.loop.call_soon_threadsafe(self.hub.revoke, serial)

    def close(self) -> None:
        """Write the ledger to its end and let go of it."""
        self.notes.put(None)
        self.clerk.join()
        self.ledger.close()

    def note(self, kind: str, **facts: Any) -> None:
        """Have an entry written into the ledger, beside what goes on; many at once cost what one costs."""
        self.notes.put((kind, facts))

    def _keep_ledger(self) -> None:
        ended = False
        while not ended:
            entries = [self.notes.get()]
            while not self.notes.empty():
                entries.append(self.notes.get())
            ended = None in entries
            try:
                self.ledger.extend(each for each in entries if each is not None)
            except CoterieError as error:
                log.error("the ledger misses %d entries: %s", len(entries), error)

    # for operators (operators.Desk)

    def submit(self, who: Any, call: operators.Submit, code: bytes) -> str:
        """Check the signature, the config, its code and that its sites exist; queue the run."""
        package = call.code[0] if call.code else ""
        signed = security.of_config(call.config, package)
        if self.mine is not None and not security.verify(who.signing_key, signed, _unhex(call.signature)):
            raise ConfigError(
                f"submit: the signature does not fit the config{' and code' if code else ''}",
                "sign it with your own key",
            )
        self._refuse(call.config, getattr(who, "name", "anyone"), package)
        if code:
            security.members(code)  # refuses what no site would unpack
        sites = sorted(name for name, seat in self.hub.seats.items() if seat.outbox is not None)
        signer = None
        if self.mine is not None:
            signer = json.dumps(
                {"name": who.name, "certificate": who.pem.decode(), "signature": call.signature}
            )
        asked = call.quotas
        if unknown := set(asked) - set(Quotas._fields):
            raise ConfigError(
                f"quotas: {sorted(unknown)[0]!r} is unknown", f"there are: {', '.join(Quotas._fields)}"
            )
        rounds, size = (int(asked[name]) if name in asked else None for name in ("rounds", "bytes"))
        quotas = Quotas(rounds, size, asked.get("seconds"))
        run = self.queue.submit(
            call.config, code=code, signer=signer, quotas=quotas, sites=sites,
            check=lambda parts: placed(parts, sites),
        )  # fmt: skip
        brought = {"code": package, "size": len(code)} if code else {}
        self.note(
            "submitted",
            run=run,
            by=getattr(who, "name", ""),
            config=hashlib.sha256(call.config.encode()).hexdigest(),
            **brought,
        )
        self._count()
        return run

    def runs(self) -> list[dict[str, Any]]:
        """Every run, the oldest first."""
        return [self._line(run) for run in self.database.runs()]

    def sites(self) -> list[dict[str, Any]]:
        """Every site that was here since the server started."""
        now = self.loop.time()
        return [
            {
                "site": name,
                "connected": seat.outbox is not None,
                "seen": f"{now - seat.seen:.0f} s ago",
                "tasks": seat.tasks,
            }
            for name, seat in sorted(self.hub.seats.items())
        ]

    def stop(self, run: str) -> None:
        """Stop it."""
        self.queue.stop(run)

    def resume(self, run: str) -> None:
        """Queue it again."""
        self.queue.resume(run)

    def delete(self, run: str) -> None:
        """Remove it."""
        self.queue.delete(run)

    def revoke(self, serials: Sequence[str]) -> None:
        """Close at once what was opened with these certificates (serial numbers, hexadecimal)."""
        for serial in serials:
            (self.authority or self.register).revoke(int(serial, 16))
        self.look()
        self.note("revoked", serials=list(serials))

    async def watch(self, run: str) -> AsyncIterator[dict[str, Any]]:
        """Its moments, and how it ended."""
        heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.watchers.setdefault(run, set()).add(heard)
        try:
            known = self.database.run(run)
            if latest := self.latest.get(run):
                yield _moment(latest)
            if known.status in ("queued", "running") or run in self.queue.places:
                while "status" not in (told := await heard.get()):
                    yield told
                yield told
            else:
                yield {"status": known.status, "error": known.error}
        finally:
            self.watchers[run].discard(heard)

    async def fetch(self, run: str, file: str, start: int) -> AsyncIterator[bytes]:
        """A file of its folder."""
        path = Path(self.database.run(run).folder) / file
        if file not in FILES or not path.is_file():
            raise ConfigError(f"run {run}: there is no file {file!r}", f"there may be: {', '.join(FILES)}")
        with path.open("rb") as source:
            source.seek(start)
            while data := await asyncio.to_thread(source.read, 1 << 20):
                yield data

    # the parts' questions

    def _refuse(self, text: str, signer: str, package: str) -> None:
        """The server has a policy too: a config names and brings no code unless its policy.toml says so."""
        path = self.options.home / "policy.toml"
        policy = security.Policy.load(path) if path.exists() else security.Policy()
        config, digest = _toml(text), hashlib.sha256(text.encode()).hexdigest()
        job = security.Job(
            run="", config=config, config_digest=digest, signer=signer, code_digest=package or None
        )
        if reason := security.refusal(policy, job):
            raise ConfigError(f"the server refuses: {reason}", f"its policy is {path.name} in its folder")

    def _connect(self, run: Run, parts: Parts, replay: Iterator[tuple[float, str]]) -> NetworkBackend:
        """Open a run in the hub; called in the run's own thread."""
        place_of = placed(parts, run.sites)
        hosts: dict[str, list[ClientId]] = {site: [] for site in run.sites}
        for client in parts.population.clients:
            hosts.setdefault(place_of(client), []).append(client)
        signer = json.loads(run.signer) if run.signer else {}
        opening = RunOpened(
            run=run.id, name=run.name, config=run.config, config_digest=run.digest,
            signature=signer.get("signature", ""), signer=signer.get("certificate", ""),
            code=self.queue.lend(run) if run.code else None,
        )  # fmt: skip
        template = expected(parts)
        limit = trees.nbytes(template) + SPARE
        opened = threading.Event()

        def begin() -> None:
            while run.code and not self.hub.shelf.hold(run.id, run.code):
                self.queue.lend(run)  # another run that had it has just ended
            self.hub.open(opening, hosts, limit=limit)
            opened.set()

        self.loop.call_soon_threadsafe(begin)
        opened.wait()
        backend = NetworkBackend(
            self.hub, run.id, place_of, replay=replay,
            expected=lambda task: template if task.kind == "train" else {},
        )  # fmt: skip
        self.traces[run.id] = backend.trace
        return backend

    def _moved(self, run: str, progress: Progress) -> None:
        """From a run's thread."""
        self.loop.call_soon_threadsafe(self._heard, run, _moment(progress), progress)

    def _heard(self, run: str, moment: dict[str, Any], progress: Progress) -> None:
        before = self.latest.get(run)
        if progress.round > (before.round if before else 0):
            telemetry.ROUNDS.labels(run).inc()
            if before is not None:
                telemetry.ROUND_SECONDS.observe(progress.seconds - before.seconds)
            log.info("round %d is committed", progress.round, extra={"run": run})
        self.latest[run] = progress
        for watcher in self.watchers.get(run, ()):
            watcher.put_nowait(moment)

    def _over(self, run: str, status: str) -> None:
        """From a run's thread."""
        try:
            error = self.database.run(run).error
        except CoterieError as lost:
            error = str(lost)
        if run in self.traces:
            self.traces.pop(run).end(status)

        def tell() -> None:
            if run in self.hub.runs:
                self.hub.close(run, status or "interrupted")
            self._count()
            self.note("ended", run=run, status=status, error=error[:1000])
            for watcher in self.watchers.get(run, ()):
                watcher.put_nowait({"status": status or "interrupted", "error": error})

        self.loop.call_soon_threadsafe(tell)

    def _ended(self, run: str) -> str:
        """How a run ended that a site still has open; "" while it goes on."""
        try:
            status = self.database.run(run).status
        except ConfigError:
            return "deleted"
        return status if status in ("finished", "failed", "stopped") else ""

    def _tell(self, what: str, **facts: Any) -> None:
        log.info("%s %s", what, {name: fact for name, fact in facts.items() if name != "detail"})
        if what in ("joined", "left"):
            telemetry.CONNECTED.set(sum(seat.outbox is not None for seat in self.hub.seats.values()))
        elif what == "answered":
            telemetry.TASKS.labels(facts["run"], "answered").inc()
            telemetry.BYTES.labels("up").inc(facts["up"][1])
            self.note(
                "received", run=facts["run"], site=facts["site"], task=facts["id"], digest=facts["up"][0],
                bytes=facts["up"][1], signature=facts["signature"],
            )  # fmt: skip
        elif what == "failed":
            telemetry.TASKS.labels(facts["run"], "failed").inc()
            if facts.get("detail"):
                log.warning("site %s, run %s:\n%s", facts["site"], facts["run"], facts["detail"])
        elif what == "unwritable":
            self.queue.lost = facts["error"]
        elif what == "assigned":
            telemetry.BYTES.labels("down").inc(facts["size"])
            self.note("sent", **facts)

    def _count(self) -> None:
        counted: dict[str, int] = {}
        for run in self.database.runs():
            counted[run.status] = counted.get(run.status, 0) + 1
        for status in ("queued", "running", "stopped", "finished", "failed", "interrupted"):
            telemetry.RUNS.labels(status).set(counted.get(status, 0))

    def _line(self, run: Run) -> dict[str, Any]:
        latest = self.latest.get(run.id)
        files = [name for name in FILES if (Path(run.folder) / name).is_file()]
        return {
            "run": run.id, "status": run.status, "error": run.error, "created": run.created,
            "signer": json.loads(run.signer)["name"] if run.signer else "",
            "round": f"{latest.round}/{latest.rounds}" if latest else "", "sites": list(run.sites),
            "files": files, "folder": run.folder,
        }  # fmt: skip

    # who is who

    def _known(self, pem: bytes, role: str) -> Known:
        assert self.current is not None
        return Known(pem, security.verified(pem, self.current().ca, role=role, revoked=self._revoked()))

    def _revoked(self) -> frozenset[int]:
        """Asked for at each message: the authority's folder is as it is now, the database as last seen."""
        return self.distrusted | self.files.revoked()

    def _site(self, pem: bytes) -> Known:
        return self._known(pem, "site")

    async def _operator(self, context: Any) -> Any:
        if self.mine is None:
            return None
        try:
            (pem,) = context.auth_context()["x509_pem_cert"]
            return self._known(pem, "operator")
        except (CoterieError, KeyError, ValueError) as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error)[:1000])

    def _renew(self, who: Any, request: bytes) -> bytes:
        assert self.authority is not None
        return self.authority.renew(request, who.pem)

    async def _renew_own(self, request: bytes) -> bytes:
        assert self.authority is not None
        assert self.current is not None
        return self.authority.renew(request, self.current().certificate)

    def _enrol(self, id: str, secret: str, request: bytes) -> bytes:
        assert self.authority is not None
        pem = self.authority.enrol(id, secret, request)
        who = security.identity_of(pem)
        log.info("enrolled %s, serial %x", who, who.serial)
        self.note("enrolled", site=who.name, serial=f"{who.serial:x}")
        return pem


@dataclass(frozen=True)
class Known:
    """Who is at the other end of a connection, with the certificate that says so (PEM)."""

    pem: bytes
    identity: security.Identity

    @property
    def name(self) -> str:
        """The party's."""
        return self.identity.name

    @property
    def serial(self) -> int:
        """Of the certificate."""
        return self.identity.serial

    @property
    def signing_key(self) -> bytes:
        """The public one."""
        return self.identity.signing_key


def placed(parts: Parts, sites: Sequence[str]) -> Callable[[ClientId], str]:
    """Which site hosts a client: its own where the data lies at sites, else they are dealt out in turn.

    Raises ConfigError when there is no site to deal to.
    """
    clients = parts.population.clients
    if parts.population.dataset.remote:
        column = parts.population.dataset.train.keys["site"]
        return dict(zip(clients, map(str, column), strict=True)).__getitem__
    if not sites:
        raise ConfigError(
            "no site is connected", "start the sites first: coterie site DIR --server HOST:PORT"
        )
    turn = {client: number for number, client in enumerate(clients)}
    return lambda client: sites[turn[client] % len(sites)]


def expected(parts: Parts) -> Tree:
    """An update as every client must send it: its names, shapes and dtypes, on the meta device."""
    algorithm = parts.algorithm
    initial = parts.initial
    if not algorithm.transforms:  # what transforms do with an update depends on it
        initial = trees.map_tree(lambda leaf: leaf.to("meta"), initial)
    state = algorithm.init(initial)
    like = trees.map_tree(lambda leaf: leaf.unsqueeze(0), update_like(algorithm, state))
    made = encode(algorithm.transforms, like, [Task(0, "", 0, 0, algorithm.broadcast(state))])
    return trees.map_tree(lambda leaf: leaf[0].to("meta"), made)


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config is no TOML: {error}") from None


def _moment(progress: Progress) -> dict[str, Any]:
    return {**asdict(progress), "folder": str(progress.folder)}


def _signed_by(who: Any, data: bytes, signature: str) -> bool:
    return security.verify(who.signing_key, data, _unhex(signature))


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
