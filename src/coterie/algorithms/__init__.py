"""Federated algorithms, one short file each, opening with the paper and its rule. Knows core, aggregators.

Read `fedavg` first, then `local` (the client's half that most share). Most others replace one part of
FedAvg: FedProx the gradient, FedOpt the server's optimiser, FedBuff the step, SCAFFOLD adds memory.
When clients work is a schedule's business; how replies are combined is an aggregator's.
"""

from collections.abc import Callable, Mapping

from coterie.algorithms.dpsgd import dpsgd
from coterie.algorithms.fedasync import fedasync
from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.fedbuff import fedbuff
from coterie.algorithms.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from coterie.algorithms.fedprox import fedprox
from coterie.algorithms.fedsgd import fedsgd
from coterie.algorithms.local import Local, Weighting, gradient
from coterie.algorithms.optimizers import OPTIMIZERS, adagrad, adam, adamw, sgd, yogi
from coterie.algorithms.scaffold import scaffold
from coterie.core.types import Algorithm

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    "dpsgd": dpsgd,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedasync": fedasync,
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedbuff": fedbuff,
    "fedprox": fedprox,
    "fedsgd": fedsgd,
    "fedyogi": fedyogi,
    "scaffold": scaffold,
}

__all__ = [
    "ALGORITHMS", "OPTIMIZERS", "Local", "Weighting", "adagrad", "adam", "adamw", "dpsgd", "fedadagrad",
    "fedadam", "fedasync", "fedavg", "fedavgm", "fedbuff", "fedprox", "fedsgd", "fedyogi", "gradient",
    "scaffold", "sgd", "yogi",
]  # fmt: skip
