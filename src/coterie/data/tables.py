"""Tables: CSV and Parquet files as data sets, with numbers standardised and categories one-hot encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from coterie.core.errors import ConfigError
from coterie.data.sources import find_path
from coterie.data.splits import as_float, split_rows
from coterie.data.types import Dataset, Examples


def from_table(
    path: str | Path,
    *,
    target: str,
    features: Sequence[str] | None = None,
    categorical: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    keys: Sequence[str] = (),
    weight: str | None = None,
    test_path: str | Path | None = None,
    test_fraction: float = 0.2,
    test_seed: int = 0,
    task: Literal["auto", "classification", "regression"] = "auto",
    missing: Literal["error", "mean"] = "error",
    name: str | None = None,
    folders: Sequence[Path] | None = None,
) -> Dataset:
    """Load a Parquet file, or a CSV file (UTF-8, with a header; gzipped if its name ends in ".gz").

    target: column to predict. features: columns to learn from (None: all but target, keys, weight and drop).
    categorical: columns to one-hot encode (None: those that hold text). drop: columns to ignore.
    keys: columns kept for partitions; a feature only if `features` names it. weight: column of row weights.
    test_path: a second file, the test set; without it test_fraction of the rows, drawn with test_seed and
    stratified by class, are the test set. task "auto": text, booleans and at most 20 different whole numbers
    are classes. missing: "error", or "mean" to fill empty numbers. name: default the file's.
    folders: where to look for relative paths.

    Inputs are stored as float32 [n, features], numbers standardised in float64 with the training rows' mean
    and standard deviation; a category that no training row has encodes as zeros.
    Raises ConfigError for an unknown column and DataError, with file, row and column, for a bad value.
    """
    from coterie.data import columns  # noqa: PLC0415  pyarrow takes long to load

    if task not in ("auto", "classification", "regression"):
        raise ConfigError(f"task={task!r}: not a task", 'use "auto", "classification" or "regression"')
    if missing not in ("error", "mean"):
        raise ConfigError(f"missing={missing!r}: not a choice", 'use "error" or "mean"')
    paths = [find_path(file, folders) for file in (path, test_path) if file is not None]
    table = columns.joined([(file, columns.read(file)) for file in paths])
    kept = [*keys, *([weight] if weight else [])]
    for column in (target, *(features or ()), *(categorical or ()), *drop, *kept):
        table.column(column)
    y, classes = columns.targets(table, target, task)
    if len(paths) == 2:
        train, test = np.split(np.arange(len(y)), [table.sources[0][1]])
    else:
        train, test = split_rows(y, test_fraction, seed=test_seed, stratify=classes is not None)
    if features is None:
        aside = {target, *kept, *drop}
        features = [column for column in table.data.column_names if column not in aside]
    if not features:
        raise ConfigError(f"{paths[0]}: no columns are left to learn from", "name some in features")
    if target in features:
        raise ConfigError(f"features: {target!r} is the target", "leave it out")
    x = [columns.encoded(table, column, categorical, train, missing) for column in features]
    beside = {column: columns.plain(table.column(column)) for column in kept}
    everything = Examples(torch.from_numpy(np.concatenate(x, axis=1)), torch.from_numpy(y), beside)
    return Dataset(
        name=name or paths[0].name.partition(".")[0],
        train=everything.take(train),
        test=everything.take(test) if len(test) else None,
        classes=classes,
        prepare=as_float,
        weight=weight,
    )
