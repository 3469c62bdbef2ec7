"""Pictures of a sweep: the records of sweep.json and the rows of its runs in, figures out.

What they look like is in `theme`; what they share with the pictures of one run is in `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from coterie.experiment.estimates import Estimate, estimate
from coterie.experiment.grid import describe, show_axes
from coterie.experiment.numbers import Rows, number, series, show
from coterie.experiment.plots import _figure, _label_ends, _tint, _value_axis
from coterie.experiment.theme import INK, LOCAL, PALETTE, styled

MOST = 6  # lines that a reader can tell apart
Record = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]


def colors(rows: Sequence[Record], metric: str) -> list[str]:
    """A colour for each row of the table: its own where there are few, else for the best, grey for others."""
    if len(rows) <= MOST:
        return list(PALETTE[: len(rows)])
    sign = -1 if metric == "accuracy" else 1
    known = [index for index, row in enumerate(rows) if row[metric] is not None]
    order = sorted(known, key=lambda index: sign * rows[index][metric])[:MOST]
    return [PALETTE[order.index(index)] if index in order else LOCAL for index in range(len(rows))]


def by_axis(rows: Sequence[Record], axes: Axes, metric: str) -> tuple[Figure, str] | None:
    """The metric over the axis with most numbers, a line for each value of the other; two long ones: a map.

    rows: the table of a sweep; axes: {path: values}, without the seed. Returns the picture and a note, or
    None where it would say nothing: no axis, no result, or more than two axes and too many lines.
    """
    known = [row for row in rows if row[metric] is not None]
    if not axes or len(known) < 2:
        return None
    along = max(axes, key=lambda path: (_numeric(axes[path]), len(axes[path])))
    others = {path: values for path, values in axes.items() if path != along}
    texts, lines = show_axes(axes), dict[str, list[Record]]()
    for row in known:
        lines.setdefault(describe({path: row[path] for path in others}, texts), []).append(row)
    if len(lines) <= MOST:
        own = None if others else dict(zip(map(id, rows), colors(rows, metric), strict=True))
        ring = " The ring marks the best." * any(row["best"] for row in rows)
        bars = "Bars: 95 % confidence of the mean over seeds." * any(row[f"{metric}_ci"] for row in rows)
        return _lines(lines, along, axes[along], metric, own), bars + ring
    if len(others) == 1:
        return _map(known, along, next(iter(others)), axes, metric), "Means over seeds; the best is bold."
    return None


@styled
def learning(runs: Sequence[Sequence[Rows]], rows: Sequence[Record], axes: Axes, metric: str) -> Figure:
    """The metric by round: for each row of the table the mean over its seeds, and its 95 % interval.

    runs: for each row of the table the metrics.jsonl of each of its runs. Where there are many, the best are
    named and the others grey. axes: {path: values}, without the seed.
    """
    fig, ax = _figure(f"{metric} by round", width=12, height=4.6)
    chosen, names, ends = colors(rows, metric), _names(rows, axes), []
    many = len(rows) > MOST
    for group, name, color in zip(runs, names, chosen, strict=True):
        points = _over_seeds(group, metric)
        if not points:
            continue
        xs, means = [x for x, _ in points], [each.mean for _, each in points]
        halves = [each.half or 0.0 for _, each in points]
        grey = many and color == LOCAL
        line = {"linewidth": 1.0, "alpha": 0.5} if grey else {"zorder": 3}
        ax.plot(xs, means, color=color, **line)
        if not grey:
            if any(halves):
                low, high = np.subtract(means, halves), np.add(means, halves)
                ax.fill_between(xs, low, high, color=color, alpha=0.16, linewidth=0)
            ax.plot(xs[-1], means[-1], "o", color=color, markersize=6, clip_on=False)
            ends.append((means[-1], name, color))
    _frame(ax, metric)
    _value_axis(ax, metric, [y for y, _, _ in ends])
    ax.set_title(f"{metric} on the global test set")
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _label_ends(ax, ends, metric)
    return fig


def _names(rows: Sequence[Record], axes: Axes) -> list[str]:
    """What the rows are called at the ends of their lines: short, or without the axes' names."""
    texts = show_axes(axes)
    names = [describe({path: row[path] for path in axes}, texts) or "mean" for row in rows]
    if max(map(len, names)) <= 24:
        return names
    order = sorted(axes, key=lambda path: max(map(len, texts[path].values())))
    return [", ".join(texts[path][repr(row[path])] for path in order) for row in rows]


def _frame(ax: mpl.Axes, metric: str) -> None:
    """Show the means and some of their bands: those of two or three seeds would dwarf all else."""
    means = [float(y) for line in ax.get_lines() for y in np.asarray(line.get_ydata())]
    if means:
        room = 0.4 * (max(means) - min(means)) or 0.1 * abs(means[0]) or 0.1
        low, high = ax.get_ylim()
        low = max(low, min(means) - room, 0.0 if min(means) >= 0 else -math.inf)
        ax.set_ylim(low, min(high, max(means) + room, 1.0 if metric == "accuracy" else math.inf))


def _over_seeds(group: Sequence[Rows], metric: str) -> list[tuple[float, Estimate]]:
    """(round, estimate) of the rounds that every run of the group has measured."""
    curves = [dict(series(rows, metric)) for rows in group]
    curves = [curve for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    found = ((x, estimate([curve[x] for curve in curves])) for x in shared)
    return [(x, each) for x, each in found if each is not None]


@styled
def _lines(
    lines: Mapping[str, Sequence[Record]],
    along: str,
    values: Sequence[Any],
    metric: str,
    own: Mapping[int, str] | None,
) -> Figure:
    """own: the colour of each row (by id) where a single line joins them; else each line has a name."""
    fig, ax = _figure(f"{metric} by {along}", width=12, height=4.6)
    place, numeric = _places(ax, values), _numeric(values)
    ends = []
    for index, ((label, rows), color) in enumerate(zip(lines.items(), PALETTE, strict=False)):
        ordered = sorted(rows, key=lambda row: place[repr(row[along])])
        shift = 0.0 if numeric else 0.12 * (index - (len(lines) - 1) / 2)
        xs = [place[repr(row[along])] + shift for row in ordered]
        ys = [row[metric] for row in ordered]
        bars = [row[f"{metric}_ci"] or 0.0 for row in ordered]
        if numeric:
            ax.plot(xs, ys, color=LOCAL if own else color, linewidth=1.4)
        if own is None:
            ends.append((ys[-1], label, color))
        for x, bar, row in zip(xs, bars, ordered, strict=True):
            dot = own[id(row)] if own else color
            ax.errorbar(x, row[metric], bar, fmt="o", color=dot, markersize=7, capsize=5, elinewidth=1.8)
            if row["best"]:
                ax.plot(x, row[metric], "o", markersize=15, fillstyle="none", color=INK, markeredgewidth=1.4)
    _value_axis(ax, metric, [])
    ax.set_title(f"final {metric} on the global test set")
    ax.set_xlabel(along)
    _label_ends(ax, ends, metric)
    return fig


@styled
def _map(rows: Sequence[Record], along: str, across: str, axes: Axes, metric: str) -> Figure:
    columns, lines = _ordered(axes[along]), _ordered(axes[across])
    grid = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        grid[lines.index(row[across]), columns.index(row[along])] = row[metric]
    fig, ax = _figure(f"{metric} by {along} and {across}", width=12, height=1.4 + 0.42 * len(lines))
    low, high = np.nanmin(grid), np.nanmax(grid)
    shares = (grid - low) / (high - low or 1.0)
    shares = shares if metric == "accuracy" else 1 - shares
    tint = _tint(np.nan_to_num(shares))
    tint[..., 3] = 0.04 + 0.5 * np.nan_to_num(shares)  # light enough for the ink upon it
    ax.imshow(tint, aspect="auto", interpolation="none")
    for row in rows:
        y, x = lines.index(row[across]), columns.index(row[along])
        weight = "bold" if row["best"] else "normal"
        ax.text(x, y, show(row[metric], metric), ha="center", va="center", color=INK, weight=weight)
    texts = show_axes(axes)
    ax.set_xticks(range(len(columns)), [_cut(texts[along][repr(value)], 16) for value in columns])
    ax.set_yticks(range(len(lines)), [_cut(texts[across][repr(value)]) for value in lines])
    ax.set_xlabel(along)
    ax.set_ylabel(across)
    ax.set_title(f"final {metric} on the global test set; stronger is better")
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    return fig


def _places(ax: mpl.Axes, values: Sequence[Any]) -> dict[str, float]:
    """Where each value stands on the x axis, set up for them: {repr of the value: x}."""
    if not _numeric(values):
        texts = show_axes({"": values})[""]
        ax.set_xticks(range(len(values)), [_cut(texts[repr(value)]) for value in values])
        ax.set_xlim(-0.5, len(values) - 0.5)
        return {repr(value): float(x) for x, value in enumerate(values)}
    xs = sorted(float(value) for value in values)
    if xs[0] > 0 and xs[-1] >= 8 * xs[0]:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
    step = math.ceil(len(xs) / 12)
    ax.set_xticks(xs[::step], [f"{x:g}" for x in xs[::step]])
    return {repr(value): float(value) for value in values}


def _numeric(values: Sequence[Any]) -> bool:
    return all(number(value) is not None for value in values)


def _ordered(values: Sequence[Any]) -> list[Any]:
    return sorted(values) if _numeric(values) else list(values)


def _cut(text: str, length: int = 28) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
