"""Servers and sites on the loopback, with certificates, a proxy that harms what it carries, and small runs."""

import asyncio
import datetime
import ipaddress
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coterie.backends import Site
from coterie.backends.network import Hub, Link, NetworkBackend, RunOpened, Server
from coterie.backends.network.hub import SILENCE
from coterie.core import Task, drive
from coterie.storage import Blobs, Memories
from coterie.trainers import Loop

# Certificates


@dataclass(frozen=True)
class Person:
    name: str
    serial: int


@dataclass(frozen=True)
class Papers:
    """A certificate, its key and who signed it, as PEM."""

    cert: bytes
    key: bytes
    ca: bytes

    def client(self):
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def server(self):
        return grpc.ssl_server_credentials([(self.key, self.cert)], self.ca, require_client_auth=True)


@cache
def authority(name="ca"):
    key = ec.generate_private_key(ec.SECP256R1())
    return certificate(name, key, None, None), key


def certificate(name, key, issuer, issuer_key, days=1):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(issuer_key or key, hashes.SHA256())
    )


@cache
def papers(name, ca="ca", days=1):
    root, root_key = authority(ca)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    cert = certificate(name, key, root, root_key, days)
    return Papers(cert.public_bytes(pem), private, authority("ca")[0].public_bytes(pem))


def person(cert_pem):
    cert = x509.load_pem_x509_certificate(cert_pem)
    (name,) = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Person(name.value, cert.serial_number)


# A network that fails


class Proxy:
    """Carries TCP connections to a port and counts the bytes. cut(): all of them end.

    clear: while it is not set, nothing passes and nobody is told. budget: bytes after which everything is cut.
    """

    def __init__(self, port):
        self.port, self.open = port, set()
        self.bytes = Counter()
        self.connections = 0
        self.budget = None
        self.clear = asyncio.Event()
        self.clear.set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.cut()
        self.server.close()

    def cut(self):
        for writer in self.open:
            writer.close()
        self.open.clear()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        self.open |= {writer, back}
        await asyncio.gather(self._carry("up", reader, back), self._carry("down", there, writer))

    async def _harm(self, data):
        return data

    async def _carry(self, way, reader, writer):
        try:
            while data := await reader.read(1 << 16):
                await self.clear.wait()
                self.bytes[way] += len(data)
                if self.budget is not None and self.bytes.total() > self.budget:
                    self.budget = None
                    self.cut()
                writer.write(await self._harm(data))
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()
        self.open.discard(writer)


# Servers and sites


@dataclass
class Diary:
    """What a hub or a link told."""

    lines: list = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, what, **facts):
        self.lines.append((what, facts))
        self.arrived.set()

    def of(self, what):
        return [facts for each, facts in self.lines if each == what]

    async def until(self, what, count=1):
        while len(self.of(what)) < count:
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), 20)
        return self.of(what)[count - 1]


@asynccontextmanager
async def serving(folder, *, tls=True, silence=SILENCE, port=0, server=None, **hub):
    """A hub and the port where it is reached; hub.diary is what it tells."""
    diary = Diary()
    hub = Hub(Blobs(folder), silence=silence, tell=diary, **hub)
    hub.diary = diary
    door = Server(hub, authorise=person if tls else None, **(server or {}))
    port = await door.start(f"127.0.0.1:{port}", papers("server").server() if tls else None)
    try:
        yield hub, port
    finally:
        await door.stop()


@asynccontextmanager
async def linked(link):
    """The link runs in the background; link.job is its task."""
    link.job = asyncio.ensure_future(link.run())
    try:
        yield link
    finally:
        link.stop()
        await asyncio.wait([link.job])


def link_of(name, address, folder, handler, *, tls=True, **more):
    address = f"127.0.0.1:{address}" if isinstance(address, int) else address
    credentials = papers(name).client if tls else None
    link = Link(
        [address], credentials, Blobs(Path(folder) / "blobs"), handler, site=name,
        answers=Path(folder) / "answers", **{"tell": Diary(), **more},
    )  # fmt: skip
    handler.link = link
    return link


class Trains:
    """A handler that trains the clients of a world, at once, in the event loop."""

    def __init__(self, world=None, algorithm=None):
        self.log, self.memories = [], Memories()
        self.count = 0
        self.declines = ""
        if world:
            trainer = Loop(world.problem, world.seed)
            self.site = Site(
                algorithm, trainer, lambda model, data: {}, world.people.__getitem__, self.memories
            )

    async def opened(self, run):
        self.log.append(("opened", run.run, run.clients))
        return self.declines

    def work(self, run, tasks):
        self.log.append(("work", run, [task.id for task in tasks]))
        self.train(run, tasks)

    def train(self, run, tasks):
        for task in tasks:
            self.count += 1
            down = self.link.blobs.read(task.down)
            reply = self.site(
                Task(
                    task.id,
                    task.client,
                    task.version,
                    task.round,
                    down,
                    task.kind,
                    task.config,
                    task.memory,
                    task.thread,
                )
            )
            up = self.link.blobs.write(reply.up)
            self.link.answer(run, task.id, up, reply.weight, reply.metrics, reply.samples)

    def dropped(self, run, ids):
        self.log.append(("dropped", run, list(ids)))

    def accepted(self, run, version, accepted, flying):
        self.log.append(("accepted", run, version, dict(accepted)))
        if version > self.memories.newest():
            self.memories.commit(version, accepted, set(flying))

    def closed(self, run, status):
        self.log.append(("closed", run, status))

    def progress(self, run):
        return self.count

    def of(self, what):
        return [line[1:] for line in self.log if line[0] == what]


class Waits(Trains):
    """A handler that does nothing with its tasks but keep them."""

    def train(self, run, tasks):
        self.tasks = tasks


def opening(run="run-1", **more):
    return RunOpened(run=run, name="test", config="", config_digest="", **more)


def play(hub, plan, run, place_of, *, replay=(), on_event=lambda record: None, expected=lambda task: None):
    """Drive a plan to its end; for a thread of its own. Everything is durable as soon as it happens."""

    async def go():
        backend = NetworkBackend(hub, run, place_of, replay=replay, expected=expected)

        def event(now, event):
            on_event(backend.last)
            backend.taken(event)

        def commit(commit):
            flying = [task.id for task in commit.resume.get("flying", ())]
            backend.accepted(commit.version, commit.accepted, flying)

        return await drive(plan, backend, on_commit=commit, on_event=event)

    return asyncio.run(go())
