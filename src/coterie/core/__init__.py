"""The core: types, tree maths, exact sums, seeds, and the loop that runs a plan. Knows torch, nothing else.

Read `types` first; it is the architecture. Then `gather` (how replies are folded), `exact` (why their
order does not matter), `drive` (how a plan meets a backend) and `seeds` (why a run repeats). `native` holds
the kernels in C.
Algorithms, schedules, data and I/O do not live here.
"""

from coterie.core.drive import drive, run_sync
from coterie.core.errors import (
    ConfigError,
    CoterieError,
    DataError,
    Fenced,
    Interrupted,
    NonFinite,
    OutOfRange,
    QuorumLost,
    RunError,
)
from coterie.core.gather import (
    Fold,
    Gathered,
    OnNan,
    accept,
    ask,
    awaits,
    empty,
    fold_task,
    gather,
    interleave,
    take,
    unfolded,
)
from coterie.core.guarantees import Guarantees
from coterie.core.seeds import Key, derive, rng, seeded, uniform
from coterie.core.types import (
    Action,
    Aggregator,
    Algorithm,
    Backend,
    Cancel,
    ClientId,
    ClientWork,
    Commit,
    Event,
    Lost,
    Optimizer,
    Plan,
    Reply,
    Schedule,
    Task,
    Tick,
    Timer,
    Tree,
)

__all__ = [
    "Action", "Aggregator", "Algorithm", "Backend", "Cancel", "ClientId", "ClientWork", "Commit",
    "ConfigError", "CoterieError", "DataError", "Event", "Fenced", "Fold", "Gathered", "Guarantees",
    "Interrupted", "Key", "Lost", "NonFinite", "OnNan", "Optimizer", "OutOfRange", "Plan", "QuorumLost",
    "Reply", "RunError", "Schedule", "Task", "Tick", "Timer", "Tree", "accept", "ask", "awaits", "derive",
    "drive", "empty", "fold_task", "gather", "interleave", "rng", "run_sync", "seeded", "take", "unfolded",
    "uniform",
]  # fmt: skip
