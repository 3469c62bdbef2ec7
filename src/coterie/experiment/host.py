"""A site: what it agrees to, trains and lets out. The half of a federation that data holders run.

The folder of a site holds its keys (`security.pki`), `policy.toml` (`security.policy`), `site.toml` (below),
its ledger, the blobs that travel and, for each run, the clients' memories. A `Link` brings tasks here; each
run trains in a process of its own (`hosting`); what leaves is written into the ledger first.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import signal
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import grpc

from coterie import security
from coterie.backends import spans, telemetry
from coterie.backends.network import Link, RunOpened, operators
from coterie.core import ClientId, Task
from coterie.core.errors import ConfigError, CoterieError, RunError
from coterie.experiment import code, parts
from coterie.experiment.hosting import Done, Job, Training
from coterie.experiment.renewal import keep_renewed
from coterie.security import packages
from coterie.storage import Blobs
from coterie.storage.ledger import Ledger

INSECURE = (
    "--insecure: nothing is encrypted, so whoever is on the way reads and changes models and updates; who "
    "answers at the server's address is believed, and may run here any config that the policy allows, signed "
    "by nobody; anybody can write a ledger like this one's. For trials on one machine only."
)
log = logging.getLogger("coterie")


@dataclass(frozen=True)
class Settings:
    """site.toml: what the site has, apart from what it allows.

    data: name -> how the site's own data of that name is loaded (a data set's kind and options, as in a run's
    [data]). code: folder of the Python files that a config may name, as far as the policy's `modules` allow.
    trainer: what trains here, whatever the config says: { kind = "custom", fit = "train.py:fit" }. compress:
    send and receive compressed. folder: where relative paths start.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: Path | None = None
    trainer: str | dict[str, Any] | None = None
    compress: bool = False
    folder: Path = field(default=Path(), compare=False)


def settings(path: Path) -> Settings:
    """Read site.toml; there need not be one. Raises ConfigError."""
    if not path.exists():
        return Settings(folder=path.parent)
    try:
        told = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", "see the guide to sites") from None
    made = Settings(**parts.arguments(Settings, told, "", ("folder",), label="site.toml"), folder=path.parent)
    for name, loader in made.data.items():
        if "dataset" not in loader:
            raise ConfigError(f"{path}: data.{name}.dataset: missing", 'name its kind: dataset = "csv"')
    return made


class Sender(Protocol):
    """The part of a Link that a host uses."""

    async def fetch(self, run: str, blob: Any) -> None:
        """Have a blob of a run here."""

    def answer(self, run: str, id: int, up: Any, weight: float, metrics: Any, samples: int) -> None:
        """Answer a task."""

    def fail(self, run: str, id: int, reason: str, detail: str) -> None:
        """Give it up."""

    def trace(self, run: str, id: int) -> str:
        """The parent of its spans."""


class Work(Protocol):
    """Who trains for one run: see `hosting.Training`."""

    doing: dict[int, Task]

    def give(self, tasks: Sequence[Task]) -> None:
        """Train these."""

    def drop(self, ids: Sequence[int]) -> None:
        """Nobody waits for these."""

    def accepted(self, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]) -> None:
        """A commit."""

    def progress(self) -> int:
        """A number that grows with work."""

    def close(self) -> None:
        """End it."""


Begin = Callable[[Job, Callable[[Done], None], Callable[[str, str], None]], Work]


class Host:
    """A link's handler: checks each run against the policy, has it trained, and writes down what leaves.

    home: the site's folder. begin: makes what trains for a run. sender: set once the link is there. Policy
    and settings are read again for each run, so that a change needs no restart.
    """

    def __init__(
        self,
        site: str,
        home: Path,
        ledger: Ledger,
        *,
        config: Path | None = None,
        keys: Path | None = None,
        data_dir: Path | None = None,
        begin: Begin = Training,
        insecure: bool = False,
    ) -> None:
        self.insecure = insecure
        self.site, self.home, self.ledger, self.data_dir = site, home, ledger, data_dir
        self.begin = begin
        self.config, self.keys = config or home, keys or home
        self.blobs = Blobs(home / "blobs")
        self.running: dict[str, Work] = {}
        self.asked: dict[str, security.Job] = {}
        self.broken: dict[str, str] = {}
        self.unpacking = asyncio.Lock()
        code.tidy(home / "code")
        self.sender: Sender
        self.policy = self._policy()
        settings(self.config / "site.toml")  # refuses a bad one now

    async def opened(self, run: RunOpened) -> str:
        """Take part, or say by which rule not."""
        try:
            self.policy = self._policy()
            job, reason = self._job(run)
            if run.code and not reason:
                job = replace(job, code=await self._code(run, self.asked[run.run].signer))
        except CoterieError as error:
            reason = f"site {self.site}: {error.args[0]}"
        else:
            if run.run not in self.asked:
                return f"site {self.site}: the run has ended"
            if not reason and run.run not in self.running:
                self.running[run.run] = self.begin(
                    job, partial(self._done, run.run), partial(self._broken, run.run)
                )
        brought = {"code": run.code.digest} if run.code else {}
        self.ledger.append(
            "refused" if reason else "joined", run=run.run, config=run.config_digest, reason=reason, **brought
        )
        log.info("run %s: %s", run.run, f"refused: {reason}" if reason else "taking part")
        return reason

    def work(self, run: str, tasks: Sequence[Task]) -> None:
        """Train these."""
        reason = self.broken.get(run, "" if run in self.running else "the run is not open here")
        if run in self.asked:
            reason = reason or security.refusal(self.policy, self.asked[run], datetime.now().astimezone())
        if reason:
            for task in tasks:
                self.sender.fail(run, task.id, reason, "")
            return
        self.running[run].give(tasks)

    def dropped(self, run: str, ids: Sequence[int]) -> None:
        """Nobody waits for these."""
        if run in self.running:
            self.running[run].drop(ids)

    def accepted(
        self, run: str, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]
    ) -> None:
        """A commit."""
        if run in self.running:
            self.running[run].accepted(version, accepted, flying)

    def closed(self, run: str, status: str) -> None:
        """The run has ended: what it left here goes."""
        self.broken.pop(run, None)
        self.asked.pop(run, None)
        if ended := self.running.pop(run, None):
            ended.close()
        if status in ("finished", "deleted"):
            shutil.rmtree(self.home / "runs" / run, ignore_errors=True)
        self.ledger.append("closed", run=run, status=status)
        log.info("run %s: %s", run, status)

    def progress(self, run: str) -> int:
        """CPU time of the run's training."""
        return self.running[run].progress() if run in self.running else 0

    def close(self) -> None:
        """End all training."""
        for each in self.running.values():
            each.close()

    async def _code(self, run: RunOpened, signer: str | None) -> code.Environment:
        """Where the code runs that comes with a run, which the policy allows: fetched and unpacked once."""
        assert run.code is not None
        digest, folder = run.code.digest, self.home.absolute() / "code"
        async with self.unpacking:
            if ready := code.prepared(folder, digest):
                return ready
            try:
                await self.sender.fetch(run.run, run.code)
            except (grpc.aio.AioRpcError, asyncio.CancelledError):
                if (task := asyncio.current_task()) and task.cancelling():
                    raise
                raise RunError("the connection broke while its code was on the way") from None
            self.ledger.append("code", run=run.run, code=digest, size=run.code.size, signer=signer)
            used = [each.code_digest for each in self.asked.values() if each.code_digest]
            try:
                return await asyncio.to_thread(code.prepare, folder, self.blobs.path(digest), used)
            finally:
                self.blobs.path(digest).unlink(missing_ok=True)

    def _policy(self) -> security.Policy:
        path = self.config / "policy.toml"
        return security.Policy.load(path) if path.exists() else security.Policy()

    def _job(self, run: RunOpened) -> tuple[Job, str]:
        """What is to be trained, and why not, if so."""
        mine = settings(self.config / "site.toml")
        config = tomllib.loads(run.config)
        data = config.get("data", {})
        named = data.get("name", "") if data.get("dataset") == "sites" else data.get("dataset", "")
        signer = signer_of(run, (self.keys / "ca.crt").read_bytes() if run.signer else b"")
        asked = security.Job(
            run=run.run,
            config={**config, "data": {k: v for k, v in data.items() if k != "test"}},
            config_digest=hashlib.sha256(run.config.encode()).hexdigest(),
            signer=signer.name if signer else "anyone" if self.insecure else None,
            signer_key=signer.signing_key if signer else b"",
            code_digest=run.code.digest if run.code else None,
            datasets=[named],
            privacy=privacy_of(config),
        )
        self.asked[run.run] = asked
        reason = security.refusal(self.policy, asked)
        if run.code and not reason:
            if run.code.size > packages.LIMIT:
                reason = f"the package has {run.code.size} bytes; at most {packages.LIMIT} may travel"
            elif mine.trainer is not None:
                reason = "site.toml: trainer: what trains here is the site's own, not code that a run brings"
        own = None
        if data.get("dataset") == "sites":
            own = mine.data.get(named)
            if own is None and not reason:
                reason = f"site.toml: there is no data named {named[:80]!r}; there is: {', '.join(mine.data)}"
        limits = self.policy.limits
        allowed = {
            "cpus": max(int(limits.cpu), 1) if limits.cpu else None,
            "memory": int(limits.memory * 1e9) if limits.memory else None,
            "gpu": limits.gpu,
            "gpus": limits.gpus,
            "gpu_memory": limits.gpu_memory,
        }
        job = Job(
            config=config,
            folder=(mine.folder / mine.code) if mine.code else mine.folder,
            home=self.home.absolute() / "runs" / run.run,
            blobs=self.blobs.folder.absolute(),
            data_dir=self.data_dir,
            site=self.site,
            data=own,
            trainer=mine.trainer,
            limits={name: value for name, value in allowed.items() if value is not None},
        )
        return job, f"site {self.site}: {reason}" if reason else ""

    def _done(self, run: str, done: Done) -> None:
        task = done.task
        if done.began is not None:
            trained = spans.begin(
                "train", self.sender.trace(run, task.id), done.began,
                run=run, site=self.site, task=task.id, client=task.client, round=task.round,
            )  # fmt: skip
            trained.end("" if done.up else "lost", done.ended)
        if done.up is None:
            self.ledger.append("failed", run=run, task=task.id, client=task.client, reason=done.reason)
            told = self.policy.tracebacks == "full"
            reason = done.reason if told or not done.log else security.redacted(self.policy, done.log)
            self.sender.fail(run, task.id, reason or "it failed", security.redacted(self.policy, done.log))
            return
        metrics = security.allowed_metrics(self.policy, done.metrics)
        asked = self.asked[run].privacy if run in self.asked and task.kind == "train" else None
        named = {"clipping": "clipping_norm", "noise": "noise_multiplier"}
        held = {name: asked[key] for name, key in named.items() if asked and asked.get(key) is not None}
        self.ledger.append(
            "reply", run=run, task=task.id, client=task.client, what=task.kind, round=task.round,
            digest=done.up.digest, bytes=done.up.size, weight=done.weight, metrics=metrics,
            samples=done.samples, **held,
        )  # fmt: skip
        self.sender.answer(run, task.id, done.up, done.weight, metrics, done.samples)

    def _broken(self, run: str, why: str, trace: str) -> None:
        """The run cannot be trained here: all of its tasks are answered so."""
        log.error("run %s cannot be trained here: %s", run, why)
        shown = security.redacted(self.policy, trace)
        said = why if self.policy.tracebacks == "full" or not trace else shown or "it cannot be trained here"
        self.broken[run] = f"site {self.site}: {said.splitlines()[0]}"
        training = self.running[run]
        for id in list(training.doing):
            training.drop([id])
            self.sender.fail(run, id, self.broken[run], shown)


async def serve(
    home: Path,
    servers: Sequence[str],
    *,
    insecure_as: str | None = None,
    keys: Path | None = None,
    config: Path | None = None,
    data_dir: Path | None = None,
    metrics: str | None = None,
    begin: Begin = Training,
    ready: Callable[[str], None] = lambda said: None,
    started: Callable[[Link], None] = lambda link: None,
) -> None:
    """Be a site until its link is stopped. Raises ConfigError, Refused.

    insecure_as: the site's name, to go without certificates and encryption. keys, config: folders of the keys
    and of site.toml and policy.toml, where they are not in `home`. started: given the link. ready: told at
    each connection.
    """
    where = keys or home
    mine = None if insecure_as else security.credentials(where)
    if mine is not None and mine.identity.role != "site":
        raise ConfigError(f"{where}: the certificate is that of {mine.identity}", "a site's is needed")
    site = mine.identity.name if mine else str(insecure_as)
    if mine is None:
        log.warning(INSECURE)
    signing = mine.signing_key if mine else hashlib.sha256(site.encode()).digest()
    with Ledger(
        home / "ledger.jsonl", partial(security.sign, signing), security.public_of(signing)
    ) as ledger:
        host = Host(
            site,
            home,
            ledger,
            config=config,
            keys=where,
            data_dir=data_dir,
            begin=begin,
            insecure=mine is None,
        )
        connected = False

        def tell(what: str, **facts: Any) -> None:
            nonlocal connected
            log.info("%s %s", what, facts)
            if what in ("connected", "disconnected"):
                connected = what == "connected"
                telemetry.CONNECTED.set(connected)
                telemetry.RECONNECTS.inc(not connected)
            if what == "connected":
                ready(f"site {site} is connected to {facts['server']}")

        bandwidth = host.policy.limits.bandwidth
        link = host.sender = Link(
            servers,
            partial(_channel_credentials, where) if mine else None,
            host.blobs,
            host,
            site=site,
            answers=home / "answers",
            sign=lambda data: security.sign(signing, data).hex(),
            compress=settings(host.config / "site.toml").compress,
            rate=bandwidth * 1e6 if bandwidth else None,
            tell=tell,
        )
        started(link)
        endpoint = (
            telemetry.Endpoint(metrics, lambda: "" if connected else "not connected") if metrics else None
        )
        anew = partial(link.reconnect, "its certificate is renewed")
        renewing = asyncio.ensure_future(keep_renewed(where, link.renew, anew)) if mine else None
        try:
            await link.run()
        finally:
            if renewing:
                renewing.cancel()
            host.close()
            if endpoint:
                endpoint.close()


def stop_at_signals(link: Link) -> None:
    """SIGTERM and Ctrl-C end the site in good order."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, link.stop)


def _channel_credentials(keys: Path) -> grpc.ChannelCredentials:
    """Raises Untrusted for a certificate that no server would take: TLS itself does not say why it fails."""
    mine = security.credentials(keys)
    security.verified(mine.certificate, mine.ca)
    return operators.credentials(mine)


def signer_of(run: RunOpened, ca: bytes) -> security.Identity | None:
    """The operator who signed the config; None when nobody did. Raises Untrusted when it is not right."""
    if not run.signer:
        return None
    who = security.verified(run.signer.encode(), ca, role="operator")
    signed = security.of_config(run.config, run.code.digest if run.code else "")
    if not security.verify(who.signing_key, signed, bytes.fromhex(run.signature)):
        what = "config and code" if run.code else "config"
        raise security.Untrusted(f"the signature of operator {who.name} does not fit the {what}")
    return who


def privacy_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config promises: of clipping, noise and secure aggregation."""
    found: dict[str, Any] = {}
    for each in config.get("transforms", []):
        if each.get("kind") == "clip":
            found["clipping_norm"] = each.get("norm")
        if each.get("kind") == "noise":
            found["noise_multiplier"] = each.get("multiplier")
    return found
