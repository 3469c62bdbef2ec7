"""Data sets, partitions into clients, and what each client holds.

Here: loading (`DATASETS`, `from_table`, `from_torch`), who holds which rows (`PARTITIONS`), how uneven that
is (`describe`), each client's prepared tensors (`populate`) and batches from a seed (`batches`).
Not here: models, training, and how data reaches a machine. Read types.py first.

    from coterie import data
    from coterie.core.seeds import derive

    digits = data.digits()
    parts = data.dirichlet(digits.train, key=derive(7, "partition"), clients=20, alpha=0.3)
    print(data.describe(digits.train, parts, digits.classes).mean_jensen_shannon)
    people = data.populate(digits, parts, holdout=0.2, key=derive(7, "population"))
    x, y = people.data(people.clients[0]).train
    for rows in data.batches(len(y), epochs=2, batch_size=32, key=derive(7, "batches")):
        x[rows], y[rows]

A table of your own, one client a hospital:

    stays = data.from_table("stays.csv", target="died", keys=["hospital"])
    parts = data.natural(stays.train, key=derive(7, "partition"), column="hospital", min_samples=15)
"""

from coterie.data.arrays import from_npz, from_torch
from coterie.data.datasets import (
    DATASETS,
    adult,
    cifar10,
    credit_default,
    digits,
    fashion_mnist,
    mnist,
    pneumoniamnist,
    shakespeare,
)
from coterie.data.held import Held, holdings
from coterie.data.lazy import Lazy, Numbered, spread
from coterie.data.partitions import (
    PARTITIONS,
    Partition,
    by_hash,
    by_range,
    dirichlet,
    feature_skew,
    iid,
    log_normal,
    natural,
    pathological,
    power_law,
    sampled,
    shards,
)
from coterie.data.population import Population, batches, populate
from coterie.data.remote import own
from coterie.data.sources import default_folders, download
from coterie.data.statistics import Statistics, describe
from coterie.data.tables import from_table
from coterie.data.types import ClientData, Dataset, Examples

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "ClientData",
    "Dataset",
    "Examples",
    "Held",
    "Lazy",
    "Numbered",
    "Partition",
    "Population",
    "Statistics",
    "adult",
    "batches",
    "by_hash",
    "by_range",
    "cifar10",
    "credit_default",
    "default_folders",
    "describe",
    "digits",
    "dirichlet",
    "download",
    "fashion_mnist",
    "feature_skew",
    "from_npz",
    "from_table",
    "from_torch",
    "holdings",
    "iid",
    "log_normal",
    "mnist",
    "natural",
    "own",
    "pathological",
    "pneumoniamnist",
    "populate",
    "power_law",
    "sampled",
    "shakespeare",
    "shards",
    "spread",
]
