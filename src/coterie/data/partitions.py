"""Partitions: who holds which rows. Pure functions of the examples, a key and the config's keywords.

Each returns {client id: sorted row indices, int64} and no client is empty. Every row has exactly one owner,
except with `sampled`, whose clients exist only when they are looked at, and share the rows, shuffled.
The ids are "client-000", "client-001", ... or, for `natural`, "column=value". The draws depend on the key
alone; `feature_skew` also computes with floats, so its ties can fall otherwise on another type of CPU.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

import numpy as np
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.core.seeds import Key, derive, rng
from coterie.core.types import ClientId
from coterie.data.lazy import Numbered, Sampled
from coterie.data.types import Column, Examples, Floats, Rows

Partition = Mapping[ClientId, Rows]
REDRAWS = 100
SAMPLED_ROWS = 2048  # enough to find a principal direction, and keeps large images affordable
POWER_STEPS = 50


def iid(examples: Examples, *, key: Key, clients: int) -> Partition:
    """Deal the shuffled rows evenly: sizes differ by at most one.

    Raises ConfigError when there are more clients than rows.
    """
    n = _check_clients("iid", examples, clients)
    return _deal(_shuffled(n, key), _even(n, clients), clients)


def dirichlet(
    examples: Examples,
    *,
    key: Key,
    clients: int,
    alpha: float,
    min_samples: int = 1,
    bins: int | None = None,
) -> Partition:
    """Share each label among the clients in proportions drawn from Dirichlet(alpha).

    Hsu, Qi and Brown 2019 (arXiv:1909.06335), in the form of Li et al. 2022 (NIID-Bench, arXiv:2102.02079).
    Draws anew, at most 100 times, until everyone has min_samples rows; after that the clients that still
    have fewer get rows of the commonest label of whoever has most.
    bins: cut a regression's targets into that many quantile bins and use them as labels.
    Raises ConfigError for alpha <= 0, or more clients * min_samples than rows.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(
            f"dirichlet(alpha={alpha}): alpha must be > 0 and finite",
            "0.1 is very uneven, 100 is almost even",
        )
    n = _check_clients("dirichlet", examples, clients, min_samples)
    labels, totals = _labels("dirichlet", examples, bins)
    for attempt in range(REDRAWS):
        shares = rng(derive(key, "shares", attempt)).dirichlet(np.full(clients, alpha), size=len(totals))
        cuts = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
        cuts[:, -1] = totals
        counts = np.diff(cuts, axis=1, prepend=0)  # [labels, clients]
        if counts.sum(axis=0).min() >= min_samples:
            break
    else:
        _top_up(counts, min_samples)
    owners = np.repeat(np.tile(np.arange(clients), len(totals)), counts.ravel())
    return _deal(_by_label(labels, n, key), owners, clients)


def pathological(
    examples: Examples, *, key: Key, clients: int, labels: int = 2, bins: int | None = None
) -> Partition:
    """Give every client exactly `labels` labels, and share each label evenly among its holders.

    The "#C = k" split of Li et al. 2022 (arXiv:2102.02079), with labels held equally often, as far as their
    rows reach. bins: as in `dirichlet`.
    Raises ConfigError when a client cannot have that many labels, or some label would have no holder.
    """
    n = _check_clients("pathological", examples, clients)
    label, totals = _labels("pathological", examples, bins)
    call = f"pathological(clients={clients}, labels={labels})"
    if not 1 <= labels <= len(totals):
        raise ConfigError(
            f"{call}: the data has {len(totals)} labels", f"choose 1 to {len(totals)} labels a client"
        )
    if clients * labels < len(totals):
        raise ConfigError(
            f"{call}: {clients * labels} label slots for {len(totals)} labels; rows would be lost",
            f"use at least {math.ceil(len(totals) / labels)} clients, or more labels a client",
        )
    draw = rng(derive(key, "labels"))
    quota = _level(np.minimum(totals, clients), clients * labels, draw.permutation(len(totals)))
    if quota is None:
        raise ConfigError(
            f"{call}: some labels have too few rows to be shared that often (fewest: {totals.min()})",
            "use fewer clients or fewer labels a client",
        )
    holders: list[list[int]] = [[] for _ in totals]
    for client in range(clients):
        # The labels with most places left come first, which always ends with every place taken.
        for held in np.lexsort((draw.random(len(quota)), -quota))[:labels]:
            holders[held].append(client)
            quota[held] -= 1
    owners = [np.asarray(who)[_even(rows, len(who))] for who, rows in zip(holders, totals, strict=True)]
    return _deal(_by_label(label, n, key), np.concatenate(owners), clients)


def shards(
    examples: Examples, *, key: Key, clients: int, shards_per_client: int = 2, bins: int | None = None
) -> Partition:
    """Sort by label, cut into clients * shards_per_client shards, deal each client its number of shards.

    McMahan et al. 2017 (arXiv:1602.05629), section 3. bins: as in `dirichlet`.
    Raises ConfigError when there are fewer rows than shards.
    """
    n = _check_clients("shards", examples, clients)
    total = clients * _count("shards", "shards_per_client", shards_per_client)
    if total > n:
        raise ConfigError(
            f"shards(clients={clients}, shards_per_client={shards_per_client}): {total} shards of {n} rows",
            "use fewer clients or fewer shards a client",
        )
    labels, _ = _labels("shards", examples, bins)
    dealt = rng(derive(key, "shards")).permutation(total) // shards_per_client
    return _deal(_by_label(labels, n, key), dealt[_even(n, total)], clients)


def power_law(examples: Examples, *, key: Key, clients: int, exponent: float) -> Partition:
    """Random rows, sizes falling as rank ** -exponent (0: equal); client-000 is the largest.

    Everyone gets one row and the rest is shared in proportion.
    Raises ConfigError for a negative exponent, or more clients than rows.
    """
    _check_clients("power_law", examples, clients)
    if not (exponent >= 0 and math.isfinite(exponent)):
        raise ConfigError(
            f"power_law(exponent={exponent}): exponent must be >= 0 and finite", "0 is even, 1 is Zipf's law"
        )
    return _sized(examples, key, np.arange(1, clients + 1, dtype=np.float64) ** -exponent)


def log_normal(examples: Examples, *, key: Key, clients: int, sigma: float) -> Partition:
    """Random rows, sizes in proportion to exp(sigma * N(0, 1)); everyone gets one row first.

    Raises ConfigError for a negative sigma, or more clients than rows.
    """
    _check_clients("log_normal", examples, clients)
    _check_sigma("log_normal", sigma, "0 is even, 2 is very uneven")
    logs = sigma * rng(derive(key, "sizes")).standard_normal(clients)
    return _sized(examples, key, np.exp(logs - logs.max()))


def natural(examples: Examples, *, key: Key, column: str, min_samples: int = 1) -> Partition:
    """One client for each value of a key column; the key is not used. Ids: "workclass=Private", %-escaped.

    Values with fewer than min_samples rows share one client, "column=(other)"; while that is still too small,
    the next smallest value joins it. Raises ConfigError for an unknown column, or too few rows altogether.
    """
    del key
    _check_clients("natural", examples, 1, min_samples)
    values, owner = np.unique(_clean("natural", examples, column), return_inverse=True)
    sizes = np.bincount(owner)
    small = sizes < min_samples
    if small.any():
        by_size = np.argsort(sizes, kind="stable")
        enough = np.searchsorted(np.cumsum(sizes[by_size]), min_samples) + 1
        small[by_size[:enough]] = True
    names = [_name(column, value) for value in values[~small]]
    if small.any():
        place = np.where(small, len(names), np.cumsum(~small) - 1)
        owner = place[owner]
        names.append(f"{quote(column, safe='')}=(other)")
    return _collect(owner, names)


def by_hash(examples: Examples, *, key: Key, clients: int, column: str | None = None) -> Partition:
    """Let a keyed hash (BLAKE2b) of each row's value choose its client: same value, same client, always.

    column None: hash the row's number. A client that no value falls to is left out.
    Raises ConfigError for an unknown column, or more clients than values.
    """
    _check_clients("hash", examples, clients)
    values, place = np.unique(_clean("hash", examples, column or "index"), return_inverse=True)
    _check_values("hash", column, len(values), clients)
    chosen = np.array([_digest(str(value), key) % clients for value in values.tolist()], dtype=np.int64)
    names = _names(clients)
    held, owner = np.unique(chosen[place], return_inverse=True)
    return _collect(owner, [names[client] for client in held])


def by_range(examples: Examples, *, key: Key, column: str, clients: int) -> Partition:
    """Cut a sortable key column into quantile ranges, one a client, in order; the key is not used.

    Equal values stay together, so sizes are only as even as the values allow.
    Raises ConfigError for an unknown column, or more clients than values.
    """
    del key
    n = _check_clients("range", examples, clients)
    values, place, counts = np.unique(
        _clean("range", examples, column), return_inverse=True, return_counts=True
    )
    _check_values("range", column, len(values), clients)
    ends = np.concatenate(([0], np.cumsum(counts)))
    inner = np.arange(1, clients)
    wanted = inner * n / clients
    cuts = np.searchsorted(ends, wanted)
    cuts -= (wanted - ends[cuts - 1]) < (ends[cuts] - wanted)
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - inner) + inner  # at least one value a client ...
    cuts = np.minimum(cuts, len(values) - clients + inner)  # ... and one left for each that follows
    return _collect(np.searchsorted(cuts, np.arange(len(values)), side="right")[place], _names(clients))


def feature_skew(examples: Examples, *, key: Key, clients: int, sigma: float = 0.1) -> Partition:
    """Sort rows along the inputs' first principal direction, blurred by noise, and cut into equal parts.

    sigma: standard deviation of the noise, in standard deviations of the projection; 0 sorts exactly, 10 is
    almost iid. The direction is found on at most 2,048 rows.
    Raises ConfigError for a negative sigma, or more clients than rows, and DataError for NaN inputs.
    """
    n = _check_clients("feature_skew", examples, clients)
    _check_sigma("feature_skew", sigma, "0 sorts exactly, 10 is almost iid")
    score = _principal_projection(examples, derive(key, "direction"))
    order = np.argsort(score + sigma * rng(derive(key, "noise")).standard_normal(n), kind="stable")
    return _deal(order, _even(n, clients), clients)


def sampled(
    examples: Examples,
    *,
    key: Key,
    clients: int,
    samples: int = 100,
    sigma: float = 0.0,
    alpha: float | None = None,
    bins: int | None = None,
) -> Partition:
    """Draw each client's rows anew when it is asked for: any number of clients, which share the rows.

    For simulations at scale: what a client has depends on the key and its id alone. Its rows are distinct,
    but other clients have them too, so one client's test rows are training rows of others.
    samples: rows of a client; with sigma > 0 the median of log-normal sizes exp(sigma z), at most all rows.
    alpha: draw each client's label shares from Dirichlet(alpha p), p those of the data (Hsu, Qi and Brown
    2019, arXiv:1909.06335, section 3); None: all rows alike. bins: as in `dirichlet`.
    Raises ConfigError for a bad number, or more samples than rows.
    """
    n = len(examples)
    _count("sampled", "clients", clients)
    if _count("sampled", "samples", samples) > n:
        raise ConfigError(f"sampled(samples={samples}): the data has only {n} rows", f"use at most {n}")
    _check_sigma("sampled", sigma, "0 is even, 2 is very uneven")
    order, pools = np.arange(n), np.array([n])
    if alpha is not None:
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ConfigError(
                f"sampled(alpha={alpha}): alpha must be > 0 and finite",
                "1 is very uneven, 1000 is almost even",
            )
        labels, pools = _labels("sampled", examples, bins)
        order = np.argsort(labels, kind="stable")
    return Sampled(Numbered(clients), key, pools, order, samples, sigma, alpha)


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "pathological": pathological,
    "shards": shards,
    "power_law": power_law,
    "log_normal": log_normal,
    "natural": natural,
    "hash": by_hash,
    "range": by_range,
    "feature_skew": feature_skew,
    "sampled": sampled,
}


def _deal(rows: Rows, owners: Rows, clients: int) -> Partition:
    """Give rows[i] to client owners[i]."""
    owner = np.empty_like(owners)
    owner[rows] = owners
    return _collect(owner, _names(clients))


def _collect(owner: Rows, names: Sequence[str]) -> Partition:
    rows = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(names))).tolist()
    return {name: rows[start:end] for name, start, end in zip(names, [0, *ends], ends, strict=False)}


def _names(clients: int) -> list[str]:
    return list(Numbered(clients))


def _name(column: str, value: object) -> str:
    text = quote(str(value), safe="")
    if len(text) > 80:  # ids become names of files
        text = f"{text[:60]}~{_digest(str(value), b''):016x}"
    return f"{quote(column, safe='')}={text}"


def _digest(text: str, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def _shuffled(n: int, key: Key) -> Rows:
    return rng(derive(key, "rows")).permutation(n)


def _by_label(labels: Rows, n: int, key: Key) -> Rows:
    """Rows in the order of their labels, shuffled within each."""
    rows = _shuffled(n, key)
    return rows[np.argsort(labels[rows], kind="stable")]


def _even(n: int, parts: int) -> Rows:
    """0, 0, ..., 1, 1, ..., parts - 1 of length n, as evenly as can be."""
    return np.arange(n) * parts // n


def _sized(examples: Examples, key: Key, weights: Floats) -> Partition:
    n, clients = len(examples), len(weights)
    exact = weights / weights.sum() * (n - clients)
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: n - clients - sizes.sum()]] += 1
    return _deal(_shuffled(n, key), np.repeat(np.arange(clients), sizes + 1), clients)


def _level(room: Rows, places: int, order: Rows) -> Rows | None:
    """Share out places as evenly as `room` allows: min(room, level), and one more for the first in order."""
    if room.sum() < places:
        return None
    level = 0
    while np.minimum(room, level + 1).sum() <= places:
        level += 1
        if level >= room.max():
            break
    quota = np.minimum(room, level)
    quota[order[room[order] > level][: places - quota.sum()]] += 1
    return quota


def _top_up(counts: Rows, least: int) -> None:
    """Move rows, in place, from whoever has most to each client below `least`. counts: [labels, clients]."""
    sizes = counts.sum(axis=0)
    richest = [(-size, client) for client, size in enumerate(sizes.tolist())]
    heapq.heapify(richest)
    for poor in np.flatnonzero(sizes < least):
        for _ in range(least - sizes[poor]):
            size, rich = richest[0]
            label = counts[:, rich].argmax()
            counts[label, rich] -= 1
            counts[label, poor] += 1
            heapq.heapreplace(richest, (size + 1, rich))


def _labels(kind: str, examples: Examples, bins: int | None) -> tuple[Rows, Rows]:
    """Labels 0 .. L-1 of the rows, and how many rows each has: all at least one."""
    y = examples.y.numpy()
    if y.ndim > 1:
        raise ConfigError(
            f"{kind}: a row of this data has {y.shape[1]} targets, so it has no one label",
            "use natural with a column, iid, or a quantity skew (power_law, log_normal)",
        )
    if examples.y.is_floating_point():
        if bins is None:
            raise ConfigError(
                f"{kind}: the targets are numbers, not labels",
                "use a quantity skew (power_law, log_normal), or bins = 10 to cut the targets into 10 labels",
            )
        if _count(kind, "bins", bins) < 2:
            raise ConfigError(f"{kind}(bins={bins}): bins must be >= 2")
        y = np.searchsorted(np.quantile(y, np.arange(1, bins) / bins), y, side="right")
    elif bins is not None:
        raise ConfigError(f"{kind}(bins={bins}): the targets are labels already", "leave bins out")
    _, labels, totals = np.unique(y, return_inverse=True, return_counts=True)
    return labels, totals


def _principal_projection(examples: Examples, key: Key) -> Floats:
    """Score of each row, [n]: mean 0, standard deviation 1."""
    x = examples.x.reshape(len(examples), -1)
    sample = x[torch.from_numpy(rng(key).permutation(len(x))[:SAMPLED_ROWS])].numpy().astype(np.float64)
    sample -= sample.mean(axis=0)
    direction = rng(derive(key, "start")).standard_normal((sample.shape[1], 1))
    for _ in range(POWER_STEPS):
        direction = sample.T @ (sample @ direction)
        direction /= float(np.linalg.norm(direction)) or 1.0
    parts = (x[start : start + SAMPLED_ROWS] for start in range(0, len(x), SAMPLED_ROWS))
    score = np.concatenate([part.numpy().astype(np.float64) @ direction for part in parts]).ravel()
    if not np.isfinite(score).all():
        raise DataError(
            "feature_skew: some inputs are NaN or infinite", "clean the data, or use another kind"
        )
    return np.asarray((score - score.mean()) / (float(score.std()) or 1.0))


def _clean(kind: str, examples: Examples, column: str) -> Column:
    values = examples.column(column)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ConfigError(
            f"{kind}(column={column!r}): row {row + 1} has no finite value",
            "drop such rows, or use another column",
        )
    return values


def _count(kind: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{kind}({name}={value!r}): {name} must be a whole number >= 1")
    return value


def _check_clients(kind: str, examples: Examples, clients: int, min_samples: int = 1) -> int:
    n = len(examples)
    if _count(kind, "clients", clients) * _count(kind, "min_samples", min_samples) > n:
        least = f", min_samples={min_samples}" if min_samples > 1 else ""
        raise ConfigError(
            f"{kind}(clients={clients}{least}): the data has only {n} rows",
            f"use at most {n // min_samples} clients" if n >= min_samples else "lower min_samples",
        )
    return n


def _check_values(kind: str, column: str | None, values: int, clients: int) -> None:
    if clients > values:
        raise ConfigError(
            f"{kind}(column={column!r}, clients={clients}): the column has only {values} different values",
            f"use at most {values} clients",
        )


def _check_sigma(kind: str, sigma: float, scale: str) -> None:
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise ConfigError(f"{kind}(sigma={sigma}): sigma must be >= 0 and finite", scale)
