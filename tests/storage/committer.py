"""A run of small commits, in processes that get killed. Commands come on stdin, one a line:

    after SECONDS     kill the run that long after it starts
    event NUMBER      let it kill itself just before its NUMBERth file operation or SQL statement
    until ROUND       let it run to the end of that round

A forked child does each, for importing torch takes longer than hundreds of commits.
"""

import os
import signal
import sqlite3
import sys
import time
from collections import ChainMap
from pathlib import Path

import torch

from coterie.storage import RunFolder

CLIENTS = ["ann", "Ann", "../bob"]


def commits(path: Path, last: int) -> None:
    """Resume the run in `path` and go on to round `last`: state and memory both feed the next round."""
    run = RunFolder.open(path)
    with run.lock():
        checkpoints, memories = run.checkpoints(keep=2), run.memories(cache_bytes=100)
        number, tree, _ = checkpoints.latest() or (-1, {"state": torch.ones(4, dtype=torch.float64)}, {})
        run.truncate(number)
        memories.back_to(number)
        state, current = tree["state"], ChainMap({}, memories.at(number))
        for round_ in range(number + 1, last + 1):
            client = CLIENTS[round_ % 3]
            memory = memories.get(client, current.get(client))
            memory = (
                torch.full((4,), 0.3, dtype=torch.float64) if memory is None else memory * 0.7 + state.sin()
            )
            state = state * 0.9 + memory
            for other in CLIENTS:  # of tasks that are lost; 128 bytes, more than stays in RAM
                memories.put(other, -round_ - 1, -memory)
            memories.put(client, round_, memory)
            current[client] = round_
            memories.commit(round_, {client: round_})
            run.append({"round": round_, "sum": float(state.sum())})
            memories.prune(checkpoints.save(round_, {"state": state}, {"round": round_}))


def kill_at(number: int, path: Path) -> None:
    """Die just before the `number`th operation on a file or folder below `path`, or fsync, or SQL statement."""
    left = [number]

    def step() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in {"open", "os.rename", "os.remove", "os.mkdir"} and str(path) in str(arguments[0]):
            step()

    def fsync(descriptor: int, really=os.fsync) -> None:
        step()
        really(descriptor)

    def connect(*arguments: object, really=sqlite3.connect, **named: object) -> sqlite3.Connection:
        file = really(*arguments, **named)  # its own operations are not seen, so between its statements
        file.set_trace_callback(lambda statement: step())
        return file

    sys.addaudithook(watch)
    os.fsync = fsync
    sqlite3.connect = connect


def main(path: Path) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        kind, value = line.split()
        child = os.fork()
        if child == 0:
            if kind == "event":
                kill_at(int(value), path)
            commits(path, int(value) if kind == "until" else 10**9)
            os._exit(0)
        if kind == "after":
            time.sleep(float(value))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
