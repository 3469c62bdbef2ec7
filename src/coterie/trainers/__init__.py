"""How clients train: the reference loop, many at once, or the user's own function. Knows core and data.

Read `loop` first: it is the meaning of an algorithm's ClientWork. `vectorised` does the same for a block of
clients, with the `layers` and `graphs` that make it fast. `problem` turns a module and a loss into pure
functions. Which client trains when, and what becomes of its reply, is not known here.
"""

from coterie.trainers.custom import Context, Custom, Fit
from coterie.trainers.loop import Loop, Step, descend, joined, rows_of, task_key
from coterie.trainers.problem import LOSSES, Problem, TaskKind, load_into, read_from
from coterie.trainers.vectorised import Vectorised

__all__ = [
    "LOSSES", "Context", "Custom", "Fit", "Loop", "Problem", "Step", "TaskKind", "Vectorised", "descend",
    "joined", "load_into", "read_from", "rows_of", "task_key",
]  # fmt: skip
