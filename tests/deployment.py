"""A real federation on loopback for tests: processes that can be killed and started again."""

import json
import queue
import signal
import socket
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import grpc

from coterie import experiment, security
from coterie.backends.network import operators
from coterie.experiment.config import load, to_toml
from coterie.experiment.quickstart import Process, set_up
from inside import Forked

SMALL = {
    "name": "small",
    "seed": 5,
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 4}},
    "model": {"kind": "mlp", "hidden": 8},
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.1, "epochs": 1, "batch_size": 64}},
    "schedule": {"kind": "synchronous", "rounds": 4, "cohort": 4},
    "backend": {"trainer": "loop"},
    "run": {"evaluate_clients": False},
}
LONG = {
    **SMALL,
    "algorithm": {**SMALL["algorithm"], "kind": "scaffold"},
    "schedule": {**SMALL["schedule"], "rounds": 20, "quorum": 4},
}


@cache
def _undisturbed(text):
    with tempfile.TemporaryDirectory() as folder:
        return experiment.run(json.loads(text), out=Path(folder) / "run").model_digest


def undisturbed(config):
    """The model_digest of the run in one process."""
    return _undisturbed(json.dumps(config))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Party(Process):
    """A process of the federation."""

    def __init__(self, command, folder, options, fault=None):
        self.log = folder.with_suffix(".log")  # beside it, for when its disk is full
        self.process = Forked([command, str(folder), *options, "--tied"], fault, self.log)
        self.lines = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()


class Deployment:
    """Server and sites in a folder; `address` is where sites connect, `port` where the server listens."""

    def __init__(self, home, sites=2, address=None, server=(), site=(), host="127.0.0.1"):
        self.home, self.names = Path(home), [f"site-{n + 1}" for n in range(sites)]
        self.host, self.port = host, free_port()
        self.address = address or f"{host}:{self.port}"
        self.server_options, self.site_options = server, site
        self.ways = {}  # site -> where it connects instead
        self.processes, self.sessions = {}, set()
        set_up(self.home, self.names, self.home)
        at, authority = self.home / "server", security.Authority.open(self.home / "ca")
        request = security.request_of(at, "server", "server")
        security.install(at, authority.issue(request, "server", "server", hosts=[host, "127.0.0.1"]))

    def start(self, *names, ready=True, fault=None):
        """fault: what happens inside these processes (`inside.arm`)."""
        names = names or ("server", *self.names)
        for name in names:
            if name == "server":
                options = ("--listen", f"{self.host}:{self.port}", *self.server_options)
            else:
                options = ("--server", self.ways.get(name, self.address), *self.site_options)
            self.processes[name] = Party(
                "server" if name == "server" else "site", self.home / name, options, fault
            )
            self.sessions.add(self.processes[name].process.pid)
        for name in names if ready else ():
            self.processes[name].hear("listening on" if name == "server" else "is connected")

    def joined(self):
        """Wait until the sites that run are connected, after the server was away."""
        deadline, wanted = time.monotonic() + 60, {*self.names} & {*self.processes}
        with self.channel() as channel:
            while wanted - {each["site"] for each in operators.ask(channel, "Sites") if each["connected"]}:
                assert time.monotonic() < deadline, "the sites do not come back"
                time.sleep(0.1)

    def kill(self, name):
        """SIGKILL, and wait until it is gone."""
        process = self.processes.pop(name)
        process.process.send_signal(signal.SIGKILL)
        process.end()

    def close(self):
        for process in self.processes.values():
            process.end()
        self.processes.clear()

    @contextmanager
    def channel(self, as_operator="operator"):
        mine = security.credentials(self.home / as_operator)
        credentials = grpc.ssl_channel_credentials(mine.ca, mine.key, mine.certificate)
        with operators.reached(self.address.split(","), credentials, 60) as channel:
            yield channel

    def submit(self, config, **more):
        text = to_toml(load(config))
        mine = security.credentials(self.home / "operator")
        signature = security.sign(mine.signing_key, security.canonical("config", {"config": text})).hex()
        with self.channel() as channel:
            call = operators.Submit(config=text, signature=signature, **more)
            return operators.ask(channel, "Submit", call)

    def watch(self, run, on_round=lambda round: None):
        """Watch a run to its end, over restarts of the server; return how it ended."""
        seen = 0
        while True:
            try:
                with self.channel() as channel:
                    for told in operators.stream(channel, "Watch", operators.Which(run=run)):
                        if "status" in told:
                            if told["status"] == "interrupted":  # the server is ending
                                break
                            return told
                        if told["round"] > seen:
                            seen = told["round"]
                            on_round(seen)
            except Exception as error:
                if not any(word in str(error) for word in ("reached", "answer", "failed", "cancelled")):
                    raise
            time.sleep(0.05)

    def result(self, run):
        return json.loads((self.home / "server" / "runs" / run / "result.json").read_text())

    def orphans(self):
        """What is left of the processes that are gone, once it has had the time to end."""
        deadline = time.monotonic() + 20
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _left(self):
        """Those of a session that began here; and those that lead their own, by the PARTY they inherited."""
        alive = {each.process.pid for each in self.processes.values()}
        mark, found = f"={self.home}/".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    state, parent, session = fields[0], int(fields[1]), int(fields[3])
                    ours = session in self.sessions or mark in (entry / "environ").read_bytes()
                    if ours and state != "Z" and alive.isdisjoint((parent, session)):
                        found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
                except OSError:
                    continue
        return found


@contextmanager
def deployed(home, *, start=True, **options):
    with ExitStack() as stack:
        made = Deployment(home, **options)
        stack.callback(made.close)
        if start:
            made.start()
        yield made
