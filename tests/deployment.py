"""A real federation on loopback for tests: processes that can be killed and started again."""

import json
import os
import signal
import socket
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from coterie import security
from coterie.backends.network import operators
from coterie.experiment.config import load, to_toml
from coterie.experiment.quickstart import Process, set_up

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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """Server and sites in a folder; `address` is where sites connect, `port` where the server listens."""

    def __init__(self, home, sites=2, address=None, server=(), site=()):
        self.home, self.names = Path(home), [f"site-{n + 1}" for n in range(sites)]
        self.port = free_port()
        self.address = address or f"127.0.0.1:{self.port}"
        self.server_options, self.site_options = server, site
        self.processes = {}
        set_up(self.home, self.names, self.home)

    def start(self, *names, ready=True):
        names = names or ("server", *self.names)
        for name in names:
            if name == "server":
                listen = ("--listen", f"127.0.0.1:{self.port}")
                self.processes[name] = Process("server", self.home / name, *listen, *self.server_options)
            else:
                options = ("--server", self.address, *self.site_options)
                self.processes[name] = Process("site", self.home / name, *options)
        for name in names if ready else ():
            self.processes[name].hear("listening on" if name == "server" else "is connected")

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
        """Processes that work in this folder and that no process of ours is."""
        ours = {each.process.pid for each in self.processes.values()}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) not in ours | {os.getpid()}:
                try:
                    told = (entry / "cmdline").read_bytes().decode(errors="replace")
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                if str(self.home) in told and parent not in ours:
                    found.append(told)
        return found


@contextmanager
def deployed(home, **options):
    with ExitStack() as stack:
        made = Deployment(home, **options)
        stack.callback(made.close)
        made.start()
        yield made
