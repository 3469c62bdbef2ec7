"""Where a plan runs. Knows core and storage; no algorithm, no schedule.

`inprocess` is the embedded default: a simulation on a virtual clock, whose clients a `Pool` answers for.
`site` is what a participant does with tasks, in every backend, and the pool of one process. `system`
simulates devices: how long they take, when they are online, who drops out.
"""

from coterie.backends.inprocess import InProcess
from coterie.backends.site import Pool, Site, Store, Trainer
from coterie.backends.system import DURATIONS, Arrival, Device, drop_out

__all__ = [
    "DURATIONS", "Arrival", "Device", "InProcess", "Pool", "Site", "Store", "Trainer", "drop_out",
]  # fmt: skip
