"""Reads a config, joins the parts, refuses pairs that cannot work, runs, compares, reports. Knows every room.

Read `run` first: what happens from a config to a report. `assemble` makes the parts, `parts` turns a section
of a config into a function call, `baselines` trains centrally and alone, `report` and `plots` show it.

Where a run keeps its state is its `place`: this process, or a server (`served`), whose runs are a `queue`.
"""

from coterie.experiment.assemble import Parts, assemble, load_dataset, load_population
from coterie.experiment.config import Config, data_folders, load, nearest, to_toml
from coterie.experiment.records import Progress, Result
from coterie.experiment.run import run
from coterie.experiment.sweep import SweepProgress, SweepResult, sweep

__all__ = [
    "Config", "Parts", "Progress", "Result", "SweepProgress", "SweepResult", "assemble", "data_folders",
    "load", "load_dataset", "load_population", "nearest", "run", "sweep", "to_toml",
]  # fmt: skip
