"""Coterie: federated learning and distributed training of PyTorch models. Train together, keep data apart.

    import coterie as ct
    result = ct.run("experiment.toml")            # or a dict with the same names
    print(result.final, result.folder)

This page is the short public API; each name lives in the room that the table says. Names are imported
when first used, so that `import coterie` costs nothing and the command line answers at once.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.aggregators import krum, mean
    from coterie.algorithms import (
        Local,
        dpsgd,
        fedadagrad,
        fedadam,
        fedasync,
        fedavg,
        fedavgm,
        fedbuff,
        fedprox,
        fedsgd,
        fedyogi,
        scaffold,
    )
    from coterie.core import Aggregator, Algorithm, ClientWork, Key, Optimizer, derive, rng
    from coterie.data import ClientData, Dataset, Examples, from_torch
    from coterie.errors import ConfigError, CoterieError, DataError, Interrupted, RunError
    from coterie.experiment import Config, Progress, Result, SweepProgress, SweepResult, load, run, sweep
    from coterie.experiment.client import client
    from coterie.trainers import Context, Fit

_ROOMS = {
    "coterie.aggregators": ("krum", "mean"),
    "coterie.algorithms": (
        "Local", "dpsgd", "fedadagrad", "fedadam", "fedasync", "fedavg", "fedavgm", "fedbuff", "fedprox",
        "fedsgd", "fedyogi", "scaffold",
    ),
    "coterie.core": ("Aggregator", "Algorithm", "ClientWork", "Key", "Optimizer", "derive", "rng"),
    "coterie.errors": ("ConfigError", "CoterieError", "DataError", "Interrupted", "RunError"),
    "coterie.data": ("ClientData", "Dataset", "Examples", "from_torch"),
    "coterie.experiment": (
        "Config", "Progress", "Result", "SweepProgress", "SweepResult", "load", "run", "sweep",
    ),
    "coterie.experiment.client": ("client",),
    "coterie.trainers": ("Context", "Fit"),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__version__ = _version("coterie")

__all__ = [
    "Aggregator", "Algorithm", "ClientData", "ClientWork", "Config", "ConfigError", "Context", "CoterieError",
    "DataError", "Dataset", "Examples", "Fit", "Interrupted", "Key", "Local", "Optimizer", "Progress",
    "Result", "RunError", "SweepProgress", "SweepResult", "client", "derive", "dpsgd", "fedadagrad",
    "fedadam", "fedasync", "fedavg", "fedavgm", "fedbuff", "fedprox", "fedsgd", "fedyogi", "from_torch",
    "krum", "load", "mean", "rng", "run", "scaffold", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from its room."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    return getattr(import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
