"""Pictures of a run: plain data in (rows of metrics.jsonl, result.json, clients.json), figures out.

What they look like is in `theme`. Nothing here reads a file or knows another room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, cycle, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from coterie.experiment.numbers import Rows, number, series, show, show_bytes, worst_decile
from coterie.experiment.theme import (
    CENTRALISED,
    DOWN,
    FEDERATED,
    INK,
    LOCAL,
    MUTED,
    PALETTE,
    PAPER,
    UP,
    styled,
    to_png,
    to_svg,
)

__all__ = [
    "accuracy_distribution",
    "answers",
    "bytes_moved",
    "comparison",
    "contenders",
    "curves",
    "partition_heatmap",
    "to_png",
    "to_svg",
]

WIDTH = 5.8  # inches, of every figure that shares a row: 418 units of an SVG, legible on a telephone too
UNITS = ((86_400.0, "days"), (3600.0, "h"), (60.0, "min"))  # of an axis that shows two or more
COLUMNS = 500  # more clients than this share a column with their neighbours in the sorted order


@styled
def curves(
    runs: Mapping[str, Rows],
    metric: str,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    over: str = "round",
) -> Figure:
    """The metric by round: a line for each run, the centralised baseline dashed, local-only dotted.

    runs: {label: rows of metrics.jsonl}; metric: "accuracy", "loss" or any other number of a row.
    A single run's loss also shows its training loss, thin. over: "time" is the virtual clock, which
    baselines do not have: they are levels then.
    """
    single, by_time = len(runs) == 1, over == "time"
    fig, ax = _figure(
        f"{metric} {'over virtual time' if by_time else 'by round'}",
        width=WIDTH if single else 12,
        height=3.7 if single else 4.6,
    )
    last = max((x for rows in runs.values() for x, _ in series(rows, metric, over)), default=0.0)
    scale, unit = next((each for each in UNITS if last >= 2 * each[0]), (1.0, "s"))
    scale = scale if by_time else 1.0
    ends: list[tuple[float, str, str]] = []

    def draw(points: list[tuple[float, float]], label: str, color: str, **line: Any) -> None:
        if points:
            xs, ys = [x / scale for x, _ in points], [y for _, y in points]
            ax.plot(xs, ys, color=color, **line)
            ax.plot(xs[-1], ys[-1], "o", color=color, markersize=6, clip_on=False)
            ends.append((ys[-1], label, color))

    for (label, rows), color in zip(runs.items(), cycle(PALETTE), strict=False):
        if single and metric == "loss":
            draw(series(rows, "train_loss", over), "training", LOCAL, linewidth=1.2)
        draw(series(rows, metric, over), label, color, zorder=3)
    for name, color, dash in (("centralised", CENTRALISED, (4, 2)), ("local_only", LOCAL, (1, 2))):
        entry = (baselines or {}).get(name) or {}
        points, level = series(entry.get("curve") or (), metric, over), number(entry.get(metric))
        label = name.replace("_", " ")
        if points:
            draw(points, label, color, linestyle=(0, dash), linewidth=1.8)
        elif level is not None:
            ax.axhline(level, color=color, linestyle=(0, dash), linewidth=1.8)
            ends.append((level, label, color))

    _value_axis(ax, metric, [y for y, _, _ in ends])
    ax.set_title(f"{metric} on the global test set")
    ax.set_xlabel(f"virtual time ({unit})" if by_time else "round")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=not by_time))
    _label_ends(ax, ends, metric)
    return fig


@styled
def partition_heatmap(clients: Mapping[str, Any]) -> Figure:
    """Who holds what: a column for each client, its size on top, the share of each label below.

    clients: clients.json. Clients are sorted by their most common label, then by its share. The
    strength of the colour is the square root of the share, so that small shares stay visible.
    """
    entries = clients["clients"]
    names = [_short(label) for label in clients.get("labels") or ()]
    sizes = np.array([number(c.get("train")) or 0 for c in entries])
    order, share = np.argsort(-sizes, kind="stable"), np.zeros((len(entries), 0))
    if names:
        counts = np.array([c.get("labels") or [0] * len(names) for c in entries], float)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        order = np.lexsort((-share.max(1), share.argmax(1)))
    n = len(entries)

    fig = Figure(figsize=(WIDTH, 4.4 if names else 2.6), layout="constrained")
    fig.set_label(f"Data of {n} clients" + (f" over {len(names)} labels" if names else ""))
    ratios = [1, 3.4] if names else [1]
    axes = fig.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    top, bottom = axes[0, 0], axes[-1, 0]
    # A bar as a stair is one path, however many clients there are.
    top.stairs(sizes[order], np.arange(n + 1) - 0.5, fill=True, color=LOCAL, alpha=0.6, linewidth=0)
    top.set_title("training examples of each client", pad=6)
    top.set_ylim(0)
    top.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    bottom.set_xlim(-0.5, n - 0.5)
    bottom.set_xticks([])
    bottom.set_xlabel(f"{n} clients, sorted by " + ("most common label" if names else "size"))
    if names:
        shares = np.array([part.mean(0) for part in np.array_split(share[order], min(n, COLUMNS))])
        area = (-0.5, n - 0.5, len(names) - 0.5, -0.5)
        bottom.imshow(_tint(shares.T), aspect="auto", interpolation="none", extent=area)
        bottom.set_title("share of each label", y=1, pad=6)  # a fixed y keeps it beside the key
        key = bottom.inset_axes((0.72, 1.04, 0.15, 0.035))
        key.imshow(_tint(np.linspace(0, 1, 15)[None]), aspect="auto", interpolation="none")
        key.set_axis_off()
        for x, align, text in ((-0.1, "right", "0 %"), (1.1, "left", "100 %")):
            key.text(x, 0.5, text, transform=key.transAxes, ha=align, va="center", color=MUTED, fontsize=10)
        bottom.grid(False)
        step = math.ceil(len(names) / 20)
        bottom.set_yticks(range(0, len(names), step), names[::step], fontsize=12 if len(names) <= 12 else 9)
        bottom.spines["bottom"].set_visible(False)
        if n <= 60:
            bottom.vlines(np.arange(1, n) - 0.5, -0.5, len(names) - 0.5, color=PAPER, linewidth=1)
        if len(names) <= 30:
            bottom.hlines(np.arange(1, len(names)) - 0.5, -0.5, n - 0.5, color=PAPER, linewidth=1)
    return fig


@styled
def accuracy_distribution(
    clients: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str = "accuracy",
) -> Figure:
    """How many clients got how good a model; below it, on the same scale, each client on its own.

    clients: clients.json, with a value of the metric for at least one client. Local-only values are
    those of clients.json, else the baseline's list on the global test set. The mean and the mean of
    the worst tenth are marked.
    """
    local = _values(clients["clients"], f"local_{metric}")
    where = "own test data"
    if not local:
        listed = ((baselines or {}).get("local_only") or {}).get("accuracies") or ()
        local = [v for v in map(number, listed) if v is not None] if metric == "accuracy" else []
        where = "global test set"
    groups = [("federated model, own test data", FEDERATED, _values(clients["clients"], metric))]
    groups += [(f"each client alone, {where}", LOCAL, local)] * bool(local)

    both = [v for _, _, values in groups for v in values]
    low, high = min(both), max(both)
    if metric == "accuracy":
        low, high = math.floor(20 * low) / 20, min(1.0, math.ceil(20 * high) / 20)
    bins = np.linspace(low, high if high > low else low + 0.05, 21)
    fig = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    fig.set_label(f"Clients by {metric}")
    axes = fig.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, (title, color, values) in zip(axes, groups, strict=True):
        ax.hist(values, bins, color=color, alpha=0.55, rwidth=0.9)
        mean, worst = sum(values) / len(values), worst_decile(values, metric)
        left, right = ("worst tenth", worst), ("mean", mean)
        if worst > mean:
            left, right = right, left
        # A name stands outside the two marks, unless it would leave the axes and there is room inside.
        a, b = ((x - bins[0]) / (bins[-1] - bins[0]) for _, x in (left, right))
        inside = a < 0.35 and b - a > 0.37
        aligns = (
            "left" if inside else "right",
            "right" if b > 0.7 and b - a > 0.33 + 0.37 * inside else "left",
        )
        for (name, x), align in zip((left, right), aligns, strict=True):
            ax.axvline(x, color=INK, linewidth=1.4, linestyle="-" if name == "mean" else (0, (3, 2)))
            ax.annotate(
                f"{name} {show(x, metric)}",
                (x, 1),
                (5 if align == "left" else -5, -1),
                xycoords=ax.get_xaxis_transform(),
                textcoords="offset points",
                ha=align,
                va="top",
            )
        ax.set_title(title, color=color)
    # The two names stand above the tallest bar, where no tick may be.
    peak = max(np.histogram(values, bins)[0].max() for _, _, values in groups)
    axes[0].set_ylim(0, 1.35 * peak)
    axes[0].set_yticks([y for y in MaxNLocator(3, integer=True).tick_values(0, peak) if y <= peak])
    axes[-1].set_xlabel(f"{metric} (height of a bar: clients)")
    if metric == "accuracy":
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    return fig


@styled
def bytes_moved(rows: Rows) -> Figure:
    """Bytes sent up (clients to server) and down since the start, by round."""
    fig, ax = _figure("bytes moved by round")
    ends = []
    for way, color in (("up", UP), ("down", DOWN)):
        points = series([{**row, "bytes": (row.get("bytes") or {}).get(way)} for row in rows], "bytes")
        if points:
            xs, total = [x for x, _ in points], np.cumsum([y for _, y in points])
            ax.plot(xs, total, color=color)
            ax.plot(xs[-1], total[-1], "o", color=color, markersize=6, clip_on=False)
            ends.append((float(total[-1]), way, color))
    ax.set_ylim(0)
    ax.set_title("bytes since the start")
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show_bytes(y)))
    _label_ends(ax, ends, "bytes")
    return fig


@styled
def answers(rows: Rows) -> Figure:
    """What became of the clients asked, by round: answered, not waited for, lost and why; totals beside."""
    fig, ax = _figure("clients answered and lost by round")
    parts: dict[str, list[float]] = {"answered": [], "not waited for": []}
    reasons = sorted({name for row in rows for name in row.get("lost_why") or ()})
    parts |= {name: [] for name in reasons}
    for row in rows:
        asked, answered, lost = (
            number((row.get("clients") or {}).get(name)) or 0.0 for name in ("asked", "answered", "lost")
        )
        parts["answered"].append(answered)
        parts["not waited for"].append(max(asked - answered - lost, 0.0))
        for name in reasons:
            parts[name].append(number((row.get("lost_why") or {}).get(name)) or 0.0)
    first = (number(rows[0].get("round")) if rows else None) or 1.0
    edges, bottom = first - 0.5 + np.arange(len(rows) + 1), np.zeros(len(rows))
    ends = []
    colors = chain((FEDERATED, LOCAL), cycle((CENTRALISED, DOWN, PALETTE[4], PALETTE[5], UP)))
    for (name, counts), color in zip(parts.items(), colors, strict=False):
        if any(counts):
            top = bottom + np.array(counts)
            ax.stairs(top, edges, baseline=bottom, fill=True, color=color, alpha=0.8, linewidth=0)
            ends.append((float((top + bottom).mean() / 2), f"{_short(name, 24)} {sum(counts):,.0f}", color))
            bottom = top
    ax.set_ylim(0)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_title("clients asked, by what became of them")
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _write_ends(ax, ends, 0.085)
    return fig


@styled
def comparison(result: Mapping[str, Any], metric: str = "accuracy") -> Figure:
    """Federated, centralised and local-only side by side; ticks are the single clients on their own."""
    bars = contenders(result, metric)
    fig, ax = _figure(f"{metric}: federated and baselines", height=0.9 + 0.62 * len(bars))
    values = [value for _, _, value in bars]
    ax.barh(range(len(bars)), values, color=[color for _, color, _ in bars], height=0.62)
    spread = ((result.get("baselines") or {}).get("local_only") or {}).get("accuracies") or ()
    alone = [v for v in map(number, spread) if v is not None] if metric == "accuracy" else []
    for row, (label, color, value) in enumerate(bars):
        if label == "local only" and alone:
            # One path with gaps, however many clients there are.
            xs, ys = np.repeat(alone, 3), np.tile([row + 0.36, row + 0.5, np.nan], len(alone))
            ax.plot(xs, ys, color=color, alpha=0.6, linewidth=1, solid_capstyle="butt")
        ax.annotate(
            show(value, metric),
            (value, row),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
        )
    ax.set_yticks(range(len(bars)), [label for label, _, _ in bars], color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, 1 if metric == "accuracy" else max([*values, 1e-12]))
    ax.set_title(f"{metric} on the global test set")
    ax.grid(False)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    return fig


def contenders(result: Mapping[str, Any], metric: str) -> list[tuple[str, str, float]]:
    """(label, colour, value) of the federated run and of each baseline that has the metric."""
    baselines = result.get("baselines") or {}
    entries = (
        ("federated", FEDERATED, result.get("final")),
        ("centralised", CENTRALISED, baselines.get("centralised")),
        ("local only", LOCAL, baselines.get("local_only")),
    )
    found = [(label, color, number((entry or {}).get(metric))) for label, color, entry in entries]
    return [(label, color, value) for label, color, value in found if value is not None]


def _figure(label: str, width: float = WIDTH, height: float = 3.7) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.set_label(label[0].upper() + label[1:])
    return fig, fig.subplots()


def _tint(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares as the federated colour of growing strength, clear at 0, so that any background will do."""
    colour = np.ones((*shares.shape, 4)) * (*to_rgb(FEDERATED), 1)
    colour[..., 3] = np.sqrt(shares)
    return colour


def _values(entries: Rows, key: str) -> list[float]:
    return [v for v in (number(entry.get(key)) for entry in entries) if v is not None]


def _short(text: Any, length: int = 16) -> str:
    """Fit for a tick: printable characters only (a lone surrogate would break the font code), and few."""
    clean = "".join(c if c.isprintable() else "\ufffd" for c in str(text))
    return clean if len(clean) <= length else clean[: length - 1] + "…"


def _value_axis(ax: Axes, metric: str, ends: Sequence[float]) -> None:
    shown = [float(y) for line in ax.get_lines() for y in np.asarray(line.get_ydata())]
    if metric.endswith("accuracy"):
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
        ax.set_ylim(top=min(1.0, ax.get_ylim()[1]))
    elif ends and min(shown) > 0 and max(shown) > 1000 * min(shown):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], metric: str) -> None:
    """Name each line at the right edge, moved apart where lines end close together."""
    lines = 2 if len(ends) <= 4 else 1
    written = []
    for value, label, color in ends:
        text = show_bytes(value) if metric == "bytes" else show(value, metric)
        written.append((value, f"{_short(label, 24)}{' ' if lines == 1 else chr(10)}{text}", color))
    _write_ends(ax, written, 0.085 * lines)


def _write_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Write (height, text, colour) at the right edge, at least `gap` of the axes apart."""
    into = ax.transData + ax.transAxes.inverted()
    heights = [float(into.transform((ax.get_xlim()[1], y))[1]) for y, _, _ in ends]
    for (_, text, color), y in zip(ends, _spread(heights, gap), strict=True):
        ax.annotate(
            text,
            (1.02, y),
            xycoords="axes fraction",
            color=color,
            va="center",
            linespacing=1.1,
            annotation_clip=False,
        )


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """The positions moved as little as a sweep up and a sweep down need to lie `gap` apart and below 1."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    if order:
        moved[order[-1]] = min(moved[order[-1]], 1.0)
    for above, below in pairwise(reversed(order)):
        moved[below] = min(moved[below], moved[above] - gap)
    return moved
