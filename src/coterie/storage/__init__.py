"""What a run leaves on disk: its folder, checkpoints, client memories and metrics.

Written so that a kill at any moment leaves a run that can be resumed. What a checkpoint holds is decided
elsewhere (schedules, experiment); how trees become bytes is `core.codec`. Read `runs.py` first.

A server's state is a database: `database` (runs, logs, commits), `lease` (one writer at a time), `archive`
(the blobs that rows name). Import these by name: they need the extra `deploy`. `ledger` is what parties prove
with.
"""

from coterie.storage.blobs import Blob, Blobs, Corrupt
from coterie.storage.checkpoints import Checkpoints
from coterie.storage.files import load_tree, save_tree, write_atomic
from coterie.storage.ledger import Entry, Head, Ledger, Tampered, verify
from coterie.storage.memories import Memories
from coterie.storage.runs import RunFolder

__all__ = [
    "Blob", "Blobs", "Checkpoints", "Corrupt", "Entry", "Head", "Ledger", "Memories", "RunFolder", "Tampered",
    "load_tree", "save_tree", "verify", "write_atomic",
]  # fmt: skip
