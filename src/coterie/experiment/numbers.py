"""Numbers of a run: read from its rows, and told to people. No pictures here, which take long to load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def number(value: Any) -> float | None:
    """The value as a float, or None when it is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def show(value: float, metric: str) -> str:
    """Accuracy as a percentage, anything else with three significant digits."""
    if metric.endswith("accuracy"):
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:#.3g}".rstrip(".")


def show_bytes(count: float) -> str:
    """A number of bytes in decimal units: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g}\u00a0{unit}" if count < 999.5 else f"{count:,.0f}\u00a0{unit}"


def worst_decile(values: Sequence[float], metric: str = "accuracy") -> float:
    """The mean over the worst tenth of the clients, rounded up (Li et al. 2020, q-FFL, arXiv:1905.10497)."""
    ordered = sorted(values, reverse=not metric.endswith("accuracy"))
    worst = ordered[: math.ceil(len(ordered) / 10)]
    return sum(worst) / len(worst)


def series(rows: Rows, metric: str, over: str = "round") -> list[tuple[float, float]]:
    """(round, value) of every row that has a finite value for the metric; `over` names another first."""
    pairs = [(number(row.get(over)), number(row.get(metric))) for row in rows]
    return [(x, y) for x, y in pairs if x is not None and y is not None]
