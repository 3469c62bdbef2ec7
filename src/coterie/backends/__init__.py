"""Where a plan runs. Knows core and storage; no algorithm, no schedule.

`inprocess` is the embedded default: a simulation on a virtual clock, whose clients a `Pool` answers for.
`site` is what a participant does with tasks, in every backend, and the pool of one process. `system`
simulates devices: how long they take, when they are online, who drops out. `crew` is the pool of many
workers: processes of this machine (`workers`) or actors of a Ray cluster (`raycluster`), with `shards` as
the half that runs there. `network` joins a server and its sites; it is imported only where it is used.
"""

from coterie.backends.crew import Crew
from coterie.backends.inprocess import InProcess
from coterie.backends.raycluster import ray_cluster
from coterie.backends.site import Pool, Site, Store, Trainer
from coterie.backends.system import DURATIONS, Arrival, Device, drop_out
from coterie.backends.workers import workers

__all__ = [
    "DURATIONS", "Arrival", "Crew", "Device", "InProcess", "Pool", "Site", "Store", "Trainer", "drop_out",
    "ray_cluster", "workers",
]  # fmt: skip
