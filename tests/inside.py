"""Servers and sites that start quickly, and harm themselves: a fault says when (at) and how (do).

at: ["sent" or "heard", a kind of message, the how many-th of it], or null for at once. do: what happens then.
"""

import atexit
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def jump(seconds):
    """The clock is set; what measures time otherwise goes on."""
    real = time.time
    time.time = lambda: real() + seconds


def damage(every):
    """A bit of each so many-th chunk that leaves here is wrong."""
    from coterie.backends.network import transfer

    made, packed = [], transfer.packed

    def harmed(*args, **options):
        frame = bytearray(packed(*args, **options))
        made.append(0)
        frame[-1] ^= len(made) % every == 0
        return bytes(frame)

    transfer.packed = harmed


def echo(seed):
    """Each message is said twice, and old ones are said again later."""
    from coterie.backends.network import hub, link, messages

    draw, said = random.Random(seed), {}
    again = messages.Answered | messages.Opened | messages.Assign | messages.Taken | messages.Accepted

    def babbling(real):
        def say(*args):
            *who, message = args
            real(*args)
            if isinstance(message, again):
                real(*args)
                old = said.setdefault(tuple(map(id, who)) if len(who) == 1 else who[-1], [])
                old.append(message)
                for each in draw.sample(old, min(3, len(old))):
                    real(*who, each)

        return say

    hub.Hub._say = babbling(hub.Hub._say)
    link.Link._say = babbling(link.Link._say)


def enter(namespace):
    """Live in this network namespace."""
    import ctypes

    with Path(f"/run/netns/{namespace}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def lie(name):
    """Say another name in the hello."""
    from coterie.backends.network import link

    hello = link.Hello
    link.Hello = lambda **told: hello(**{**told, "site": name})


def arm(at, do):
    name, *arguments = do
    action = {"kill": kill, "jump": jump, "damage": damage, "echo": echo, "enter": enter, "lie": lie}[name]
    if at is None:
        action(*arguments)
        return
    from coterie.backends.network import carrier, desk, hub, link, messages, server

    way, kind, count = at
    seen = []

    def met(message):
        if message.__dict__.get("message") == kind:
            seen.append(0)
            if len(seen) == count:
                action(*arguments)

    if way == "heard":
        parse = messages.parse

        def heard(data):
            message = parse(data)
            met(message)
            return message

        for module in (carrier, desk, hub, link, messages, server):
            if hasattr(module, "parse"):
                module.parse = heard
    else:
        packed = messages.Said.__bytes__

        def sent(message):
            met(message)
            return packed(message)

        messages.Said.__bytes__ = sent


def main(arguments, fault, stdin, stdout, log):
    """`coterie` with these arguments, as a process of its own."""
    os.setsid()
    os.environ["PARTY"] = arguments[1]  # for `Deployment.orphans`
    for number, file in enumerate((stdin, stdout)):
        os.dup2(file.fileno(), number)
        file.close()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["coterie", *arguments]
    if fault:
        arm(**fault)
    from coterie.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out: spans are sent then


class Forked:
    """As subprocess.Popen, of `coterie`: a fork of a process that has loaded it already, which is quicker."""

    def __init__(self, arguments, fault, log):
        stdin, self.stdin = nursery.Pipe(duplex=False)
        told, stdout = nursery.Pipe(duplex=False)
        self.job = nursery.Process(target=main, args=(arguments, fault, stdin, stdout, str(log)))
        self.job.start()
        self.pid = self.job.pid
        stdin.close()
        stdout.close()
        self.stdout = os.fdopen(os.dup(told.fileno()), encoding="utf-8")
        told.close()

    def wait(self, timeout=None):
        self.job.join(timeout)
        if self.job.exitcode is None:
            raise subprocess.TimeoutExpired("coterie", timeout)
        return self.job.exitcode

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number):
        if self.job.exitcode is None:
            os.kill(self.pid, number)


nursery = get_context("forkserver")
nursery.set_forkserver_preload(
    [
        "coterie.cli.server",
        "coterie.experiment.server",
        "coterie.experiment.office",
        "coterie.experiment.host",
        "coterie.cli.running",
    ]
)
