"""A child process of this program. It ends with its parent.

It hears pickles, and tells lines of JSON: it may run code that travelled here, so its parent reads nothing
that becomes code or grows without bounds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from coterie.experiment.code import Environment, told
from coterie.storage.files import make_folder

LINE = 16 << 20  # bytes of the longest line
# The parent's path, and what only this Python has (a wheel in its environment) before the parent's packages.
BEGIN = """
import sys
own, sys.path = sys.path, sys.argv[2:]
at = 1 + max((sys.path.index(each) for each in own if each in sys.path), default=-1)
sys.path[at:at] = [each for each in own if each not in sys.path]
from coterie.experiment.{0} import live
live(int(sys.argv[1]))
"""


class Child:
    """A process that runs `live` of a module of this room; it is told this job first.

    code: whose code it may run: by that environment's Python, with few variables, and `home` as its user's
    folder. None: only what is installed here, with the variables of this process.
    """

    def __init__(self, module: str, job: Any, home: Path, code: Environment | None = None) -> None:
        self.pipe, theirs = Pipe()
        self.begun = b""  # a line that has not come to its end
        if code is not None:
            make_folder(home)
        self.process = subprocess.Popen(  # noqa: S603  this very program
            [
                *(code.python if code else sys.executable, "-P", "-c", BEGIN.format(module)),
                *(str(theirs.fileno()), *(str(Path(each).absolute()) for each in sys.path if each)),
            ],
            stdin=subprocess.PIPE,  # open as long as this process is there
            stdout=2,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that what it starts ends with it
            env=told(home.absolute()) if code else None,
        )
        theirs.close()
        self.send(job)

    def send(self, message: Any) -> None:
        """Tell it something; what is dead hears nothing."""
        with suppress(OSError):
            self.pipe.send(message)

    def lines(self) -> list[bytes]:
        """Wait until it has told something. Raises EOFError when it has ended, or tells more than it may."""
        data = os.read(self.pipe.fileno(), 1 << 20)
        *whole, self.begun = (self.begun + data).split(b"\n")
        if not data or len(self.begun) > LINE:
            raise EOFError
        return whole

    def kill(self) -> None:
        """From any thread: whoever waits for it sees its end."""
        with suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill it and what it has started; return how it ended: an exit code, or minus a signal."""
        self.pipe.close()
        self.kill()
        code = self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        return code


class Parent:
    """The other end of the pipe. Made once, as the first thing that a child does."""

    def __init__(self, handle: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        lifeline = os.dup(0)
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 0)
        threading.Thread(target=_end_at_eof, args=(lifeline,), daemon=True).start()
        self.pipe = Connection(handle)
        self.out = open(os.dup(handle), "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115

    def hear(self) -> Any:
        """The next message. Raises EOFError, OSError when there is no parent any more."""
        return self.pipe.recv()

    def tell(self, **facts: Any) -> None:
        """Say something."""
        self.out.write(json.dumps(facts, ensure_ascii=False) + "\n")
        self.out.flush()


def how(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _end_at_eof(lifeline: int) -> None:
    """A parent that is killed leaves no orphans, of ours or of the child's."""
    while os.read(lifeline, 4096):
        pass
    os.killpg(0, signal.SIGKILL)
