"""sweep.html, sweep.csv and cells.csv: the table of a sweep, its pictures, and a link to each of its runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coterie.experiment import pages, report, sweep_plots
from coterie.experiment.grid import describe, short_names, show_axes
from coterie.experiment.numbers import show, show_bytes
from coterie.experiment.report import WORST, _count, _duration
from coterie.experiment.theme import LOCAL, to_svg
from coterie.storage import write_atomic

Record = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]
TITLES = {
    "accuracy": "accuracy",
    "loss": "loss",
    "client_mean": "client {}",
    "worst_decile": "worst tenth",
    "bytes": "bytes",
    "seconds": "time",
}
MEANING = (
    "± is the half-width of the 95 % confidence interval of the mean over seeds (Student’s t); it says how "
    "much the draw of the seeds matters, and nothing of other data."
)


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write sweep.html, sweep.csv (the table) and cells.csv (a line a run) from what sweep.json holds."""
    write_atomic(folder / "sweep.csv", to_csv(state["rows"]).encode())
    write_atomic(folder / "cells.csv", to_csv(state["cells"]).encode())
    pages.replace(folder / "sweep.html", render(folder, state))


def to_csv(records: Sequence[Record]) -> str:
    """The records as CSV: every key is a column; what is missing is empty, lists and tables are JSON."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow([_field(record.get(column)) for column in columns])
    return out.getvalue()


def table(rows: Sequence[Record], axes: Axes, metric: str) -> tuple[list[str], list[list[str]]]:
    """The table as text: the columns' titles, and a line of cells for each row. axes: without the seed."""
    names, texts = short_names(axes), show_axes(axes)
    measured = {name: title for name, title in TITLES.items() if any(row[name] is not None for row in rows)}
    lines = []
    for row in rows:
        seeds = str(row["seeds"]) if row["seeds"] == row["of"] else f"{row['seeds']} of {row['of']}"
        values = [texts[path][repr(row[path])] for path in axes]
        lines.append([*values, seeds, *(show_estimate(row, name, metric) for name in measured)])
    return [*names.values(), "seeds", *(title.format(metric) for title in measured.values())], lines


def show_estimate(record: Record, measure: str, metric: str) -> str:
    """A measure of a row as text: "93.1 ± 0.4 %"; a dash where it is missing."""
    mean, half = record[measure], record[f"{measure}_ci"]
    if mean is None:
        return "–"
    if measure == "bytes":
        return show_bytes(mean)
    if measure == "seconds":
        return _duration(mean)
    kind = metric if measure in ("client_mean", "worst_decile") else measure
    if half is None:
        return show(mean, kind)
    if kind == "accuracy":
        return f"{100 * mean:.1f}\u00a0±\u00a0{100 * half:.1f}\u00a0%"
    return f"{show(mean, kind)}\u00a0±\u00a0{half:.2g}"


def render(folder: Path, state: Mapping[str, Any]) -> str:
    """The page of a sweep, from what sweep.json holds and the runs in its folder."""
    rows, metric = state["rows"], state["metric"]
    axes = {path: values for path, values in state["axes"].items() if path != "seed"}
    finished = [cell for cell in state["cells"] if cell["status"] == "finished"]
    curves = {cell["cell"]: report.read(folder / cell["cell"]).rows for cell in finished}
    runs = [[curves[cell["cell"]] for cell in finished if _alike(cell, row, axes)] for row in rows]
    cards = []
    if (drawn := sweep_plots.by_axis(rows, axes, metric)) is not None:
        figure, note = drawn
        cards.append(pages.card(f"Final {metric}", _scrolling(to_svg(figure)), note, wide=True))
    cards.append(_table(rows, axes, metric))
    if curves:
        for each in dict.fromkeys((metric, "loss")):
            figure = sweep_plots.learning(runs, rows, axes, each)
            note = "Means over seeds; bands: their 95 % confidence."
            note += f" The best {sweep_plots.MOST} in colour." * (len(rows) > sweep_plots.MOST)
            title = f"{each.capitalize()} by round"
            cards.append(pages.card(title, _scrolling(to_svg(figure)), note, wide=True))
    cards += [_runs(state["cells"], metric), _config(state["base"])]
    return pages.page(f"Sweep: {state['name']}", _header(state, axes) + "".join(cards))


def _header(state: Mapping[str, Any], axes: Axes) -> str:
    rows, cells, metric = state["rows"], state["cells"], state["metric"]
    failed = sum(cell["status"] != "finished" for cell in cells)
    best = next((row for row in rows if row["best"]), rows[0])
    status = f"{failed} of {len(cells)} failed" if failed else "finished"
    said = f"{_count(len(rows), 'combination')}, {_count(len(cells), 'run')}"
    verdict = "No run has finished."
    if best[metric] is not None:
        of = f", the mean of {best['seeds']} seeds" if best["seeds"] > 1 else ""
        reached = f"{metric} {show_estimate(best, metric, metric)}{of}"
        named = escape(describe({path: best[path] for path in axes}, show_axes(axes)))
        verdict = f"Best: {named}, with {reached}." if axes else f"Final {reached}."
    errors = "".join(f'<p class="error">{escape(error)}</p>' for row in rows for error in row["errors"])
    return (
        f'<header><p class="eyebrow">Sweep: {said}</p><div class="title"><h1>{escape(state["name"])}</h1>'
        f'<span class="status {"failed" if failed else "finished"}">{status}</span></div>'
        f'<p class="verdict">{verdict}</p>{errors}</header>'
    )


def _table(rows: Sequence[Record], axes: Axes, metric: str) -> str:
    columns, lines = table(rows, axes, metric)
    shown = []
    for row, line, color in zip(rows, lines, sweep_plots.colors(rows, metric), strict=True):
        mark = ' class="best"' if row["best"] else ""
        cells = [f"<span{mark}>{escape(text)}</span>" for text in line]
        shown.append(pages.row("best" if row["best"] else "", color, cells))
    note = MEANING if any(row[f"{metric}_ci"] is not None for row in rows) else ""
    content = pages.table(["", *map(escape, columns)], shown)
    return pages.card("Results", content, f"{note} {WORST}", wide=True)


def _runs(cells: Sequence[Record], metric: str) -> str:
    lines = []
    for cell in cells:
        link = f'<a style="color: inherit" href="{quote(cell["cell"])}/report.html">report</a>'
        value = cell.get(metric)
        done = cell["status"] == "finished"
        reached = "–" if value is None else show(value, metric)
        time = _duration(cell.get("seconds"))
        status = cell["status"] if not cell.get("error") else f"failed: {escape(cell['error'])}"
        lines.append(pages.row(cell["cell"], LOCAL, [status, reached, time, link if done else "–"]))
    return pages.card("Runs", pages.table(("run", "status", metric, "time", ""), lines), wide=True)


def _config(base: Mapping[str, Any]) -> str:
    text = escape(json.dumps(base, indent=2, ensure_ascii=False))
    code = f'<pre tabindex="0" role="region" aria-label="Config"><code>{text}</code></pre>'
    return pages.card("What all runs share", code, wide=True)


def _alike(cell: Record, row: Record, axes: Axes) -> bool:
    return all(cell[path] == row[path] for path in axes)


def _scrolling(svg: str) -> str:
    return f'<div class="scroll">{svg}</div>'


def _field(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, list | dict | tuple | bool) else value
