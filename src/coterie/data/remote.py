"""Data that lies at sites: what a server knows of it, and a site's own data in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError
from coterie.data.types import Dataset, Examples

COLUMN = "site"


def at_sites(
    *,
    name: str,
    sites: list[str],
    input_shape: list[int],
    classes: list[str] | None = None,
    target_shape: list[int] | None = None,
    integers: bool = False,
    test: Dataset | None = None,
    folders: Sequence[Path] | None = None,  # noqa: ARG001 every loader takes it
) -> Dataset:
    """Data that each site has of its own, under `name` in its site.toml; here are stand-ins of zeros.

    One client a site: partition = { kind = "natural", column = "site" }. input_shape: of one prepared
    example; integers: are they int64, for an embedding? classes: the labels, in the order of their numbers;
    None for a regression. target_shape: [T] where an example has T of them. test: what the server evaluates
    on, if anything. Raises ConfigError when a site comes twice or there is none, DataError when `test` does
    not fit.
    """
    if not sites or len(set(sites)) != len(sites):
        raise ConfigError(f"data.sites = {sites}: name each site once", 'for example ["north", "south"]')
    n, kind = len(sites), torch.int64 if integers else torch.float32
    y = torch.zeros(n, *(target_shape or []), dtype=torch.float32 if classes is None else torch.int64)
    train = Examples(torch.zeros(n, *input_shape, dtype=kind), y, {COLUMN: np.array(sites)})
    labels = None if classes is None else tuple(classes)
    made = Dataset(name, train, None, labels, _as_stored, remote=True)
    if test is None:
        return made
    _check(made, test, "the server's test set")
    examples = test.test or test.train
    return replace(made, test=Examples(test.prepare(examples.x), examples.y))


def own(wanted: Dataset, mine: Dataset, site: str) -> Dataset:
    """A site's own data in the place of the stand-ins: all of its training rows belong to one client.

    Raises DataError when it is not what the run expects.
    """
    _check(wanted, mine, f"{site}'s data {wanted.name!r}")
    keys = {**mine.train.keys, COLUMN: np.full(len(mine.train), site)}
    return replace(mine, name=wanted.name, train=replace(mine.train, keys=keys))


def _check(wanted: Dataset, found: Dataset, what: str) -> None:
    facts: Mapping[str, Callable[[Dataset], Any]] = {
        "inputs of shape": lambda each: list(each.input_shape),
        "inputs of type": lambda each: str(each.prepare(each.train.x[:1]).dtype).removeprefix("torch."),
        "classes": lambda each: each.classes and list(each.classes),
        "targets of shape": lambda each: list(each.train.y.shape[1:]),
    }
    for fact, of in facts.items():
        if of(found) != of(wanted):
            raise DataError(
                f"{what} has {fact} {of(found)}, the run expects {of(wanted)}",
                "mend the site's loader, or [data] of the run",
            )


def _as_stored(rows: Tensor) -> Tensor:
    return rows
