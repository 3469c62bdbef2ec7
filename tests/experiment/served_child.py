"""Servers that get killed. Commands come on stdin, one a line, each with a database's URL and a folder:

    step URL FOLDER NUMBER      let it kill itself just before its NUMBERth SQL statement, commit or file
                                operation
    after URL FOLDER SECONDS    kill it that long after it starts
    end URL FOLDER              let it run to the end

A forked child does each, for importing torch takes longer than a run.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from sqlalchemy import Engine, event

from coterie.experiment import report, run
from coterie.experiment.queue import EXIT_CODES, Queue
from coterie.storage.database import Database
from sites import Sites, hub

WARM = {
    "name": "warm",
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 2}},
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.1}},
    "schedule": {"kind": "synchronous", "rounds": 1, "cohort": 1},
    "backend": {"trainer": "loop"},
}


def serve(url: str, folder: Path) -> int:
    """Run what is queued, as a server that starts does; the exit code of the last run."""
    database = Database(url)
    assert database.acquire("server", timeout=10)
    sites = folder / "sites"
    queue = Queue(
        database, folder, hub(sites), lambda run, parts, replay: Sites(parts, sites, replay), at_once=1
    )
    queue.start()
    code = 0
    for each in database.runs():
        code = EXIT_CODES[queue.wait(each.id).status]
    queue.close()
    database.release()
    return code


def kill_at(number: int, folder: Path) -> None:
    left = [number]

    def step(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        if name in {"open", "os.rename", "os.link", "os.remove"}:
            path = str(arguments[0])
            if str(folder) in path and "/sites/" not in path:
                step()

    sys.addaudithook(watch)
    event.listen(Engine, "before_cursor_execute", step)
    event.listen(Engine, "commit", step)


def main() -> None:
    torch.set_num_threads(1)
    report.write = lambda folder: folder
    with tempfile.TemporaryDirectory() as warm:  # imports what takes longer than a run
        run(WARM, out=Path(warm) / "r")
    for line in sys.stdin:
        kind, url, folder, *value = line.split()
        child = os.fork()
        if child == 0:
            if kind == "step":
                kill_at(int(value[0]), Path(folder))
            os._exit(serve(url, Path(folder)))
        if kind == "after":
            time.sleep(float(value[0]))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
