"""The records of this room: rows as stored, a data set, and what one client holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.core.errors import ConfigError, DataError

Column = NDArray[Any]  # [n] values of a sortable kind: numbers or text
Rows = NDArray[np.int64]  # indices of rows
Floats = NDArray[np.float64]
TARGETS = ((torch.int64, 1), (torch.int64, 2), (torch.float32, 1))  # dtype and rank


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """n rows as stored: images stay uint8 [n, C, H, W], tables are float32 [n, features], text int64 [n, T].

    y is int64 [n] (class indices), int64 [n, T] (T of them a row: the next characters of a text) or float32
    [n] (targets of a regression); keys hold one value a row for the partitions that split by a column.
    Raises DataError when lengths or types do not fit.
    """

    x: Tensor
    y: Tensor
    keys: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, Tensor | Column] = {"x": self.x, "y": self.y, **self.keys}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"examples: columns of different lengths: {lengths}")
        if (self.y.dtype, self.y.ndim) not in TARGETS:
            raise DataError(
                f"examples: targets are {self.y.dtype} {list(self.y.shape)}",
                "give int64 class indices [n] or [n, T], or float32 values [n]",
            )

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Examples:
        """Return these rows, in this order."""
        index = torch.from_numpy(rows)
        keys = {name: column[rows] for name, column in self.keys.items()}
        return Examples(self.x[index], self.y[index], keys)

    def column(self, name: str) -> Column:
        """Return the key column [n]; "index" is the row's number unless a column has that name.

        Raises ConfigError for an unknown name.
        """
        if name in self.keys:
            return self.keys[name]
        if name == "index":
            return np.arange(len(self))
        names = [*self.keys, "index"]
        near = get_close_matches(name, names, n=1)
        raise ConfigError(
            f"column {name!r}: these examples have {', '.join(names)}",
            f"did you mean {near[0]!r}?" if near else 'name the columns to keep when loading: keys = ["..."]',
        )


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A named data set, with a global test set when it has one.

    classes: names by class index, None for a regression. prepare: stored inputs [b, ...] -> model inputs
    [b, ...], row by row: float32, or int64 for an embedding. weight: the key column that says what a row
    weighs. remote: the rows lie at sites, and those here stand in for them. Raises DataError when a class
    index has no name, or training and test shapes differ.
    """

    name: str
    train: Examples
    test: Examples | None
    classes: tuple[str, ...] | None
    prepare: Callable[[Tensor], Tensor]
    weight: str | None = None
    remote: bool = False

    def __post_init__(self) -> None:
        for part, examples in (("train", self.train), ("test", self.test)):
            if examples is None:
                continue
            if self.classes is None:
                fits = examples.y.is_floating_point()
            else:
                y = examples.y
                fits = not y.is_floating_point() and bool(((y >= 0) & (y < len(self.classes))).all())
            if not fits:
                wanted = "float32" if self.classes is None else f"class indices 0 to {len(self.classes) - 1}"
                raise DataError(f"{self.name}: the {part} targets are not all {wanted}")
            for what, mine, training in (
                ("inputs", examples.x, self.train.x),
                ("targets", examples.y, self.train.y),
            ):
                if mine.shape[1:] != training.shape[1:]:
                    shapes = f"{list(mine.shape[1:])}, training ones {list(training.shape[1:])}"
                    raise DataError(f"{self.name}: test {what} have the shape {shapes}")

    @property
    def task(self) -> Literal["classification", "regression"]:
        """What is learnt: "classification" or "regression"."""
        return "regression" if self.classes is None else "classification"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one prepared example."""
        return tuple(self.prepare(self.train.x[:1]).shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class ClientData:
    """What one client holds, prepared: inputs [n, ...] and targets [n] or [n, T]; test may have 0 rows.

    weight: the client's own weight, if the data names one.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    weight: float | None = None
