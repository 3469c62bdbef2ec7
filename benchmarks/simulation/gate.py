"""How a system's process talks to the driver: it runs rounds when told to, and says how long they took.

The process says that it is ready, in one JSON line. The driver writes "go" on standard input; the process
answers with one more line, and so on. The rounds of each "go" are agreed beforehand, so systems that own
their loop need only call `tick` after each round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any


class Gate:
    """Blocks between the allotments of rounds. What libraries print goes to standard error, the log."""

    def __init__(self, allotments: Sequence[int]) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.allotments = list(allotments)
        self.rounds = 0
        self.ready = False
        self.start = 0.0

    def open(self) -> None:
        """Wait for the word, then start the clock. Without a driver there is nothing left to do."""
        if not self.ready:
            self.ready = True
            self.tell(ready=True)
        if sys.stdin.readline() != "go\n":
            os._exit(0)
        self.rounds = self.allotments.pop(0)
        self.start = time.perf_counter()

    def tick(self) -> bool:
        """A round is done. After the last of an allotment: tell, and wait for the next. True then."""
        self.rounds -= 1
        if self.rounds:
            return False
        self.tell(seconds=time.perf_counter() - self.start)
        if self.allotments:
            self.open()
        return True

    def tell(self, **facts: Any) -> None:
        """Write one line to the driver."""
        self.out.write(json.dumps(facts) + "\n")
        self.out.flush()
