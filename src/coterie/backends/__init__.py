"""Where a plan runs. Knows core and storage; no algorithm, no schedule.

`inprocess` is the embedded default: one process, a virtual clock. `site` is what a participant does with a
task, in every backend. `system` simulates devices: durations and drop-outs.
"""

from coterie.backends.inprocess import InProcess
from coterie.backends.site import Site
from coterie.backends.system import DURATIONS, drop_out

__all__ = ["DURATIONS", "InProcess", "Site", "drop_out"]
