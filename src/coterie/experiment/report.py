"""report.html of a run folder, and of several side by side: one file, no script, nothing fetched.

Whatever a folder says (names, labels, errors, the config) is untrusted text and is escaped; what is
missing is said in a sentence in its place.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from coterie.core.errors import DataError
from coterie.experiment import pages, plots
from coterie.experiment.milestones import levels, milestones, timed, uneven
from coterie.experiment.numbers import number, series, show, show_bytes, worst_decile
from coterie.experiment.theme import PALETTE

WORST = "Worst tenth: the mean over the tenth of the clients that the model serves worst."


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds; an empty value stands for a file that is not there (yet)."""

    folder: Path
    config: str
    rows: list[dict[str, Any]]
    result: dict[str, Any]
    clients: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's own name, else its folder's."""
        return str(self.result.get("name") or self.folder.resolve().name)

    @property
    def metric(self) -> str:
        """What the run is judged by: "accuracy" where it is known, else "loss"."""
        final = self.result.get("final") or {}
        known = number(final.get("accuracy")) is not None or series(self.rows, "accuracy")
        return "accuracy" if known and self.result.get("task") != "regression" else "loss"

    def final(self, metric: str) -> float | None:
        """The final value, else that of the last round that was evaluated."""
        value = number((self.result.get("final") or {}).get(metric))
        points = series(self.rows, metric)
        return points[-1][1] if value is None and points else value

    def baseline(self, name: str, metric: str) -> float | None:
        """What a baseline ("centralised", "local_only") reached."""
        return number(((self.result.get("baselines") or {}).get(name) or {}).get(metric))

    def worst_decile(self) -> float | None:
        """The metric's mean over the worst tenth of the clients."""
        known = number((self.result.get("clients") or {}).get(f"{self.metric}_worst_decile"))
        values = [v for c in self.clients.get("clients", ()) if (v := number(c.get(self.metric))) is not None]
        return worst_decile(values, self.metric) if known is None and values else known

    def bytes(self, way: str) -> float:
        """Bytes moved "up" or "down" in the whole run."""
        total = number((self.result.get("bytes") or {}).get(way))
        if total is None:
            total = sum(number((row.get("bytes") or {}).get(way)) or 0 for row in self.rows)
        return total

    def seconds(self) -> float | None:
        """Wall-clock seconds of the whole run."""
        total = number((self.result.get("seconds") or {}).get("total"))
        return number(self.rows[-1].get("seconds")) if total is None and self.rows else total

    def lost(self) -> int:
        """How many tasks were never answered."""
        return int(sum(number((r.get("clients") or {}).get("lost")) or 0 for r in self.rows))


def read(folder: Path) -> Run:
    """Read config.toml, metrics.jsonl, result.json and clients.json; each may be missing.

    Raises DataError when none is there, or one is damaged. A last line of metrics.jsonl that was cut
    off by a crash is left out.
    """
    texts = {}
    for file in ("config.toml", "metrics.jsonl", "result.json", "clients.json"):
        path = folder / file
        texts[file] = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not any(texts.values()):
        raise DataError(
            f"{folder}: not a run folder",
            "give a folder that holds config.toml, metrics.jsonl or result.json",
        )
    lines = texts["metrics.jsonl"].split("\n")[:-1]
    return Run(
        folder,
        texts["config.toml"],
        [_object(line, folder / "metrics.jsonl") for line in lines if line.strip()],
        _object(texts["result.json"], folder / "result.json"),
        _object(texts["clients.json"], folder / "clients.json"),
    )


def render(folder: Path) -> str:
    """The report of a run folder as one HTML page. Raises DataError like `read`."""
    run = read(folder)
    status = str(run.result.get("status") or "unfinished")
    known = status if status in {"finished", "budget spent", "failed", "interrupted"} else ""
    error = f'<p class="error" role="alert">{escape(str(e))}</p>' if (e := run.result.get("error")) else ""
    header = f"""<header>
<p class="eyebrow">Federated run</p>
<div class="title"><h1>{escape(run.name)}</h1><span class="status {known}">{escape(status)}</span></div>
<p class="verdict">{escape(verdict(run))}</p>
{error}
</header>
{_tiles(run)}"""

    cards = [
        *_by_round(run),
        *_by_device(run),
        _comparison(run),
        _distribution(run),
        _partition(run),
        _traffic(run),
        _training(run),
        _privacy(run),
    ]
    return pages.page(run.name, f'{header}\n<div class="grid">\n{"".join(cards)}</div>\n{_reproduce(run)}')


def write(folder: Path) -> Path:
    """Write report.html into the run folder, whole or not at all, and return its path."""
    return pages.replace(folder / "report.html", render(folder))


def verdict(run: Run) -> str:
    """One sentence in plain language: how good, and how that compares with the baselines."""
    final, metric, rounds = run.final(run.metric), run.metric, _rounds(run)
    if run.result.get("status") == "failed":
        when = f"after {_count(rounds, 'round')}" if rounds else "before its first round was over"
        return f"The run failed {when}" + (f", at {_measured(final, metric)}." if final is not None else ".")
    if final is None:
        if not rounds:
            return "No round has finished."
        return f"{_count(rounds, 'round')} finished; the model has not been evaluated."
    n = _population(run)
    who = f"{_count(n, 'client')} trained together" if n else "The clients, trained together,"
    others = [
        (words, value)
        for name, words in (("centralised", "training centrally"), ("local_only", "the average client alone"))
        if (value := run.baseline(name, metric)) is not None
    ]
    if metric == "accuracy":
        compared = ": " + ", ".join(f"{_gap(final - value)} {words}" for words, value in others)
    else:
        compared = ", against " + " and ".join(
            f"{show(value, metric)} for {words}" for words, value in others
        )
    return f"{who} reached {_measured(final, metric)}{compared if others else ''}."


def compare(folders: Sequence[Path], reach: Sequence[float] = ()) -> tuple[list[dict[str, Any]], Figure]:
    """A row for each run, and the curves of all.

    Keys: name, algorithm, rounds, metric, accuracy, loss, worst_decile (of the metric), bytes,
    seconds; missing values are None. A name that occurs twice gives way to the folders' names. The
    curves show accuracy where any run has it, else the loss. reach: accuracies, for one more key:
    "reached" lists {accuracy, round, time, bytes_up} for each, and curves are over virtual time then,
    where the runs' clocks tell it. Raises DataError like `read`.
    """
    runs = [read(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    rows, curves = [], {}
    for run in runs:
        name = run.name if names.count(run.name) == 1 else run.folder.resolve().name
        name = name if name not in curves else str(run.folder)
        curves[name] = run.rows
        rows.append(
            {
                "name": name,
                "algorithm": _algorithm(run.config),
                "rounds": _rounds(run),
                "metric": run.metric,
                "accuracy": run.final("accuracy"),
                "loss": run.final("loss"),
                "worst_decile": run.worst_decile(),
                "bytes": run.bytes("up") + run.bytes("down"),
                "seconds": run.seconds(),
            }
        )
        if reach:
            found = [each._asdict() for each in milestones(run.rows, reach)]
            rows[-1]["reached"] = [{"accuracy": each.pop("level"), **each} for each in found]
    metric = "accuracy" if any(series(r, "accuracy") for r in curves.values()) else "loss"
    over = "time" if reach and any(timed(r) for r in curves.values()) else "round"
    return rows, plots.curves(curves, metric, over=over)


def write_compare_html(path: Path, folders: Sequence[Path], reach: Sequence[float] = ()) -> Path:
    """Write a page that sets several runs side by side, whole or not at all, and return its path.

    reach: accuracies for a table of the time to each.
    """
    rows, figure = compare(folders, reach)
    best = {
        column: pick([row[column] for row in rows if row[column] is not None], default=None)
        for column, pick in (("accuracy", max), ("loss", min))
    }
    lines = []
    for row, color in zip(rows, cycle(PALETTE), strict=False):
        cells = [escape(row["algorithm"] or "–"), f"{row['rounds']:,}"]
        for column, metric in (("accuracy", "accuracy"), ("loss", "loss"), ("worst_decile", row["metric"])):
            mark = ' class="best"' if row[column] is not None and row[column] == best.get(column) else ""
            cells.append(f"<span{mark}>{_or_dash(row[column], metric)}</span>")
        cells += [show_bytes(row["bytes"]), _duration(row["seconds"])]
        lines.append(pages.row(row["name"], color, cells))
    columns = ("run", "algorithm", "rounds", "accuracy", "loss", "worst tenth", "bytes", "time")
    title = f"{_count(len(rows), 'run')} compared"
    header = f'<header><p class="eyebrow">Federated runs</p><h1>{title}</h1></header>'
    chart = f'<div class="scroll">{plots.to_svg(figure)}</div>'
    cards = [
        pages.card(str(figure.get_label()), chart, wide=True),
        pages.card("Results", pages.table(columns, lines), f"Best values are bold. {WORST}", wide=True),
    ]
    if reach:
        lines = [
            pages.row(row["name"], color, map(said, row["reached"]))
            for row, color in zip(rows, cycle(PALETTE), strict=False)
        ]
        table = pages.table(("run", *(f"{show(level, 'accuracy')} accuracy" for level in reach)), lines)
        note = "First evaluated round at or above it: virtual time, round, bytes sent up until then."
        cards.append(pages.card("Time to accuracy", table, note, wide=True))
    return pages.replace(path, pages.page(title, header + "".join(cards)))


def said(reached: Mapping[str, Any]) -> str:
    """An entry of `compare`'s "reached" in a cell: "12.5 s, round 7, 1.2 MB up", or a dash."""
    if reached["round"] is None:
        return "–"
    when = [] if reached["time"] is None else [_duration(reached["time"])]
    up = show_bytes(reached["bytes_up"])
    return ", ".join([*when, f"round\u00a0{reached['round']:,}", f"{up}\u00a0up"])


def _tiles(run: Run) -> str:
    final, worst, n, lost = run.final(run.metric), run.worst_decile(), _population(run), run.lost()
    tiles = [
        (
            f"Final {run.metric}" if run.result.get("final") else f"Latest {run.metric}",
            _or_dash(final, run.metric),
        ),
        ("Worst tenth of clients", _or_dash(worst, run.metric)),
        ("Clients", f"{n:,}" if n else "–"),
        ("Rounds", f"{_rounds(run):,}"),
        ("Replies lost", f"{lost:,}"),
        ("Sent up", show_bytes(run.bytes("up"))),
        ("Sent down", show_bytes(run.bytes("down"))),
        ("Wall-clock time", _duration(run.seconds())),
    ]
    for claim in (run.result.get("privacy") or {}).get("claims") or ():
        if (epsilon := number(claim.get("epsilon"))) is not None:
            label = "" if claim.get("protected") else " (simulated noise: not private)"
            tiles.append((f"Privacy ε at δ = {number(claim.get('delta')) or 0:.0e}{label}", f"{epsilon:.3g}"))
    return '<dl class="tiles">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles) + "</dl>"


def _by_round(run: Run) -> list[str]:
    baselines = run.result.get("baselines") or {}
    cards = [
        pages.card(
            f"{metric.capitalize()} by round",
            plots.to_svg(plots.curves({"federated": run.rows}, metric, baselines)),
        )
        for metric in ("accuracy", "loss")
        if series(run.rows, metric) or (metric == "loss" and series(run.rows, "train_loss"))
    ]
    why = "No round has been evaluated." if run.rows else "No round has finished."
    return cards or [pages.card("Learning by round", note=why)]


def _by_device(run: Run) -> list[str]:
    """Time to accuracy, and who answered: what simulated devices are for."""
    cards, clock = [], timed(run.rows)
    if found := milestones(run.rows, levels(run.rows)):
        head = ("accuracy", "round", *["virtual time"] * clock, "sent up")
        lines = []
        for each in found:
            cells = [f"{each.round:,}", *[_duration(each.time)] * clock, show_bytes(each.bytes_up or 0.0)]
            name = f'<th scope="row">{show(each.level, "accuracy")}</th>'
            lines.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        picture = ""
        if uneven(run.rows):
            baselines = run.result.get("baselines") or {}
            picture = plots.to_svg(plots.curves({"federated": run.rows}, "accuracy", baselines, "time"))
        note = "When each accuracy was first reached" + "; virtual time is what the devices took" * clock
        cards.append(pages.card("Time to accuracy", picture + pages.table(head, lines), f"{note}."))
    elif uneven(run.rows) and series(run.rows, "loss", "time"):
        cards.append(
            pages.card(
                "Loss over time", plots.to_svg(plots.curves({"federated": run.rows}, "loss", None, "time"))
            )
        )
    if any(row.get("lost_why") for row in run.rows):
        note = "Late: after the deadline. Not waited for: enough others had answered."
        cards.append(pages.card("Who answered", plots.to_svg(plots.answers(run.rows)), note))
    return cards


def _comparison(run: Run) -> str:
    title, metric = "Was it worth training together?", run.metric
    result = {**run.result, "final": {m: run.final(m) for m in ("accuracy", "loss")}}
    bars = plots.contenders(result, metric)
    if len(bars) < 2:
        return pages.card(title, note="No baseline was trained, so there is nothing to compare the run with.")
    own = number(((run.result.get("baselines") or {}).get("local_only") or {}).get("own_accuracy"))
    columns = {m: {k: v for k, _, v in plots.contenders(result, m)} for m in ("accuracy", "loss")}
    columns = {m: known for m, known in columns.items() if known}
    lines = [
        pages.row(label, color, (_or_dash(known.get(label), m) for m, known in columns.items()))
        for label, color, _ in bars
    ]
    table = pages.table(("trained", *columns), lines)
    note = "All on the global test set; local only is the mean over clients that train alone."
    if own is not None:
        note += f" On its own test data a client alone reaches {show(own, 'accuracy')}."
    return pages.card(title, plots.to_svg(plots.comparison(result, metric)) + table, note)


def _distribution(run: Run) -> str:
    title, metric, clients = "How it serves each client", run.metric, run.clients.get("clients") or []
    known = sum(number(c.get(metric)) is not None for c in clients)
    if not known:
        return pages.card(title, note="No client has been evaluated on its own test data.")
    note = WORST
    if known < len(clients):
        note += f" {_count(len(clients) - known, 'client')} without a value left out."
    return pages.card(
        title,
        plots.to_svg(plots.accuracy_distribution(run.clients, run.result.get("baselines"), metric)),
        note + _sampled(run),
    )


def _partition(run: Run) -> str:
    title = "Who holds which data"
    if not run.clients.get("clients"):
        return pages.card(title, note="The run folder does not say how the data are divided.")
    distance, sizes = run.clients.get("distance") or {}, run.clients.get("sizes") or {}
    facts = [
        f"{words} {number(distance[key]):.3g}"
        for key, words in (("jensen_shannon", "Jensen–Shannon"), ("earth_mover", "earth mover’s"))
        if number(distance.get(key)) is not None
    ]
    note = "Mean distance of a client’s labels from all labels: " + ", ".join(facts) + " (0 is even). "
    note *= bool(facts)
    if all(number(sizes.get(k)) is not None for k in ("min", "median", "max")):
        note += f"Examples of a client: {sizes['min']:,} to {sizes['max']:,}, median {sizes['median']:,}."
    return pages.card(title, plots.to_svg(plots.partition_heatmap(run.clients)), note + _sampled(run))


def _traffic(run: Run) -> str:
    if not any(row.get("bytes") for row in run.rows):
        return pages.card("Bytes moved", note="No round has sent anything.")
    n = sum(number((r.get("clients") or {}).get("answered")) or 0 for r in run.rows)
    note = f"{show_bytes(run.bytes('up') / n)} up for each of {n:,.0f} replies." if n else ""
    return pages.card("Bytes moved", plots.to_svg(plots.bytes_moved(run.rows)), note)


def _training(run: Run) -> str:
    """Which trainer was at work, and what batched each layer; nothing for runs that do not say."""
    told = run.result.get("trainer") or {}
    if not told.get("kind"):
        return ""
    means = {
        "vectorised": "Blocks of clients as one batched computation.",
        "loop": "One client after the other.",
        "custom": "The user’s own function.",
    }
    rows = [
        f'<tr><th scope="row">{escape(str(layer))}</th><td>{escape(str(path))}</td></tr>'
        for layer, path in (told.get("layers") or {}).items()
    ]
    table = pages.table(["layer", "batched by"], rows)
    title = f"How clients were trained: {told['kind']}"
    return pages.card(title, table if rows else "", means.get(str(told["kind"]), ""))


def _privacy(run: Run) -> str:
    """Each claim in words, with what it rests on; nothing for runs without noise."""
    told = run.result.get("privacy") or {}
    lines = []
    for claim in told.get("claims") or ():
        label = "" if claim.get("protected") else "<strong>Simulated noise: not private.</strong> "
        said = (
            f"Each {claim.get('unit')}, with ε = {number(claim.get('epsilon')) or 0:.3g} and "
            f"δ = {claim.get('delta')} after {claim.get('rounds')} rounds: whether it took part changes the "
            "odds of anything that the adversary may see by at most a factor e^ε, but for a probability δ. "
            f"The adversary is {claim.get('adversary')}. Noise: {claim.get('mechanism')}, multiplier "
            f"{number(claim.get('noise_multiplier')) or 0:.4g}, clipping norm {claim.get('clipping_norm')}; "
            f"accountant: {claim.get('accountant')}; neighbours: {claim.get('neighbours')}."
        )
        limits = "".join(f"<li>{escape(str(each))}</li>" for each in claim.get("assumptions") or ())
        lines.append(f"<p>{label}{escape(said)}</p><p>It rests on, or does not cover:</p><ul>{limits}</ul>")
    if not lines:
        return ""
    withheld = ", ".join(map(str, told.get("withheld") or ()))
    return pages.card("What is protected", "".join(lines), f"Withheld: {withheld}.", wide=True)


def _reproduce(run: Run) -> str:
    digest = escape(str(run.result.get("model_digest") or "not known"))
    seed = f" with seed <code>{escape(str(run.result['seed']))}</code>" if "seed" in run.result else ""
    config = (
        f'<pre tabindex="0" role="region" aria-label="Config"><code>{escape(run.config)}</code></pre>'
        if run.config
        else '<p class="missing">The run folder has no config.toml.</p>'
    )
    return pages.card(
        "Reproduce", f'<p class="digest">Model digest{seed}: <code>{digest}</code></p>{config}', wide=True
    )


def _object(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})", "restore the file or remove it") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object", "restore the file or remove it")
    return value


def _algorithm(config: str) -> str:
    try:
        return str(tomllib.loads(config)["algorithm"]["kind"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return ""


def _rounds(run: Run) -> int:
    return int(max((number(row.get("round")) or 0 for row in run.rows), default=0))


def _population(run: Run) -> int:
    return int(number(run.clients.get("of")) or len(run.clients.get("clients") or ()))


def _sampled(run: Run) -> str:
    shown = len(run.clients["clients"])
    return f" Shown: {shown:,} of {_population(run):,} clients." if shown < _population(run) else ""


def _measured(value: float, metric: str) -> str:
    text = show(value, metric)
    return f"{text} accuracy" if metric == "accuracy" else f"a test loss of {text}"


def _gap(difference: float) -> str:
    points = round(100 * difference, 1)
    if not points:
        return "level with"
    return f"{abs(points):.1f} point{'s' * (abs(points) != 1)} {'above' if points > 0 else 'below'}"


def _or_dash(value: float | None, metric: str) -> str:
    return "–" if value is None else show(value, metric)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60}\u00a0min"
