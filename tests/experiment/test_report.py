"""Plots and reports: what is drawn is what the folder says, and nothing in a folder can act on the page."""

import errno
import json
import math
import os
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.errors import DataError, RunError
from coterie.experiment import numbers, plots, report, theme

HOSTILE = """<script>alert('x')</script><img src="http://evil.example/x.png" onerror=alert(1)>&amp;"""
TITLES = (
    "Accuracy by round",
    "Loss by round",
    "Was it worth training together?",
    "How it serves each client",
    "Who holds which data",
    "Bytes moved",
)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run-1", rounds=12, clients=20)


def load(folder, file):
    return json.loads((folder / f"{file}.json").read_text())


def change(folder, file, **values):
    (folder / f"{file}.json").write_text(json.dumps(load(folder, file) | values))
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_figure_is_there(run):
    page = Page(report.render(run))
    figures = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == len(set(figures)) == len(TITLES)
    assert all(title in page.text for title in TITLES)
    assert load(run, "result")["model_digest"] in page.text
    assert (run / "config.toml").read_text() in page.text


def test_same_folder_same_bytes(run):
    assert report.render(run) == report.render(run)


def test_nothing_is_fetched(run, tmp_path):
    other = report.write_compare_html(tmp_path / "compare.html", [run])
    for html in (report.render(run), other.read_text()):
        page = Page(html)
        policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        links = [a[k] for _, a in page.tags for k in ("src", "href", "xlink:href", "srcset") if k in a]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert not re.search(r"url\((?!#)|@import", html)
        assert {"script", "iframe", "object", "base", "form"}.isdisjoint(t for t, _ in page.tags)


def test_untrusted_text_stays_text(make_run, tmp_path):
    clean = make_run(tmp_path / "clean", rounds=3, clients=5)
    change(clean, "result", status="interrupted", error="stopped")
    folder = make_run(tmp_path / "hostile", rounds=3, clients=5)
    change(folder, "result", name=HOSTILE, status=HOSTILE, error=HOSTILE, model_digest=HOSTILE, seed=HOSTILE)
    change(folder, "clients", labels=["<b>", "$x^$", "&lt;", '" id="a"', "\ud800\x00", "标签", *"<>&'"])
    (folder / "config.toml").write_text(HOSTILE)
    html = report.write(folder).read_text()
    page, reference = Page(html), Page(report.render(clean))
    assert Counter(t for t, _ in page.tags) == Counter(t for t, _ in reference.tags)
    assert page.text.count(HOSTILE) == 7  # title, heading, status, error, seed, digest, config
    for label in ("<b>", "$x^$", "&lt;", '" id="a"', "标签"):
        assert label in page.text
    compared = report.write_compare_html(tmp_path / "c.html", [folder, clean]).read_text()
    assert "script" not in {t for t, _ in Page(compared).tags}


def without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def unevaluated(folder):
    rows = [{k: v for k, v in row.items() if k in ("round", "seconds")} for row in rows_of(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(folder, "result", final=None)


def no_client_evaluated(folder):
    clients = [c | {"accuracy": None, "local_accuracy": None} for c in load(folder, "clients")["clients"]]
    change(folder, "clients", clients=clients)


@pytest.mark.parametrize(
    ("damage", "sentences"),
    [
        (lambda f: change(f, "result", baselines=None), ["No baseline was trained"]),
        (lambda f: change(f, "result", baselines={}, final=None), ["No baseline was trained"]),
        (without("clients.json"), ["does not say how the data are divided", "No client has been evaluated"]),
        (no_client_evaluated, ["No client has been evaluated"]),
        (without("result.json"), ["unfinished", "not known"]),
        (without("config.toml"), ["no config.toml"]),
        (without("result.json", "metrics.jsonl", "clients.json"), ["No round has finished"]),
        (unevaluated, ["3 rounds finished; the model has not been evaluated", "No round has sent anything"]),
        (lambda f: change(f, "result", status="failed", error="Out of memory"), ["failed after 3 rounds"]),
        (lambda f: change(f, "clients", labels=[], distance=None, sizes=None), ["Who holds which data"]),
    ],
)
def test_missing_parts_are_said(make_run, tmp_path, damage, sentences):
    folder = make_run(tmp_path / "run", rounds=3, clients=4)
    damage(folder)
    page = Page(report.render(folder))
    for sentence in sentences:
        assert sentence in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text


def test_regression_is_judged_by_loss(make_run, tmp_path):
    folder = make_run(tmp_path / "run", rounds=4, clients=12, task="regression")
    text = Page(report.render(folder)).text
    assert "Accuracy by round" not in text
    assert "Final loss" in text
    change(folder, "result", final={"loss": 0.25}, baselines={"centralised": {"loss": 0.2}})
    assert report.verdict(report.read(folder)) == (
        "12 clients trained together reached a test loss of 0.250, against 0.200 for training centrally."
    )


def test_verdict_says_the_differences(make_run, tmp_path):
    folder = make_run(tmp_path / "run", rounds=2, clients=1)
    baselines = {"centralised": {"accuracy": 0.973}, "local_only": {"accuracy": 0.747}}
    change(folder, "clients", of=100)
    change(folder, "result", final={"accuracy": 0.961}, baselines=baselines)
    assert report.verdict(report.read(folder)).replace("\u00a0", " ") == (
        "100 clients trained together reached 96.1 % accuracy: 1.2 points below training centrally, "
        "21.4 points above the average client alone."
    )
    change(folder, "result", final={"accuracy": 0.9731}, baselines={"centralised": {"accuracy": 0.973}})
    assert report.verdict(report.read(folder)).endswith(": level with training centrally.")


def test_a_line_cut_off_by_a_crash_is_left_out(make_run, tmp_path):
    folder = make_run(tmp_path / "run", rounds=3, clients=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "accu')
    assert [row["round"] for row in report.read(folder).rows] == [1, 2, 3]


def test_damaged_folders_are_refused(make_run, tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        report.render(tmp_path)
    folder = make_run(tmp_path / "run", rounds=3, clients=4)
    for name, text in (("result.json", "[1]"), ("clients.json", "{"), ("metrics.jsonl", "{\n")):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(DataError, match=name):
            report.render(folder)
        (folder / name).write_text(before)


def test_a_crash_while_writing_leaves_the_old_report(make_run, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", rounds=3, clients=4)
    path = report.write(folder)
    before = path.read_bytes()
    change(folder, "result", name="other")

    def crash(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(RunError, match="disk full"):
        report.write(folder)
    assert path.read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_compare(make_run, tmp_path):
    good = make_run(tmp_path / "a" / "run-1", name="good", rounds=4, clients=10, top=0.99)
    poor = make_run(tmp_path / "a" / "run-2", name="poor", rounds=6, clients=10, top=0.8)
    rows, figure = report.compare([good, poor])
    assert [row["name"] for row in rows] == ["good", "poor"]
    assert [row["rounds"] for row in rows] == [4, 6]
    assert [row["algorithm"] for row in rows] == ["fedavg", "fedavg"]
    for row, folder in zip(rows, (good, poor), strict=True):
        assert row["accuracy"] == load(folder, "result")["final"]["accuracy"]
        assert row["bytes"] == sum(r["bytes"]["up"] + r["bytes"]["down"] for r in rows_of(folder))
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].get_lines() if len(line.get_ydata()) > 1]
    assert drawn == [[r["accuracy"] for r in rows_of(f) if "accuracy" in r] for f in (good, poor)]
    html = report.write_compare_html(tmp_path / "compare.html", [good, poor]).read_text()
    best = max(rows, key=lambda row: row["accuracy"])
    assert f'<span class="best">{numbers.show(best["accuracy"], "accuracy")}</span>' in html


def test_compare_tells_runs_of_one_name_apart(make_run, tmp_path):
    folders = [make_run(tmp_path / f / "run", rounds=2, clients=3) for f in ("a", "b")]
    folders.append(make_run(tmp_path / "a" / "run-2", rounds=2, clients=3))
    rows, _ = report.compare(folders)
    assert len({row["name"] for row in rows}) == 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_worst_decile_is_the_mean_of_the_worst_tenth(values):
    k = math.ceil(len(values) / 10)
    assert numbers.worst_decile(values) == pytest.approx(np.sort(values)[:k].mean())
    assert numbers.worst_decile(values, "loss") == pytest.approx(np.sort(values)[-k:].mean())


def test_curves_draw_only_finite_values_at_their_rounds():
    values = {1: 0.5, 2: None, 3: float("nan"), 4: 0.75, 5: float("inf"), 7: 0.875}
    rows = [{"round": r, "accuracy": v} for r, v in values.items()] + [{"round": 8}]
    line = plots.curves({"federated": rows}, "accuracy").axes[0].get_lines()[0]
    assert line.get_xydata().tolist() == [[1, 0.5], [4, 0.75], [7, 0.875]]


def test_names_of_lines_that_end_together_do_not_overlap():
    runs = {f"run {i}": [{"round": 1, "accuracy": 0.5}, {"round": 2, "accuracy": 0.9}] for i in range(7)}
    figure = plots.curves(runs, "accuracy")
    plots.to_svg(figure)  # lays it out
    boxes = sorted((t.get_window_extent() for t in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert boxes[-1].y1 <= figure.bbox.y1


def test_losses_over_many_decades_have_readable_ticks():
    rows = [{"round": r, "loss": 10.0**-r} for r in range(6)]
    assert "mathdefault" not in plots.to_svg(plots.curves({"federated": rows}, "loss"))


@pytest.mark.parametrize("n", [1, 10, 499, 1000])
def test_partition_shows_every_share(n):
    rng = np.random.default_rng(n)
    counts = rng.multinomial(60, np.full(5, 0.2), n)
    clients = [{"client": str(i), "train": 60, "labels": c.tolist()} for i, c in enumerate(counts)]
    figure = plots.partition_heatmap({"labels": list("abcde"), "clients": clients})
    image = np.asarray(figure.axes[1].get_images()[0].get_array())
    shares = image[..., 3] ** 2
    assert shares.shape == (5, min(n, plots.COLUMNS))
    assert shares.sum(0) == pytest.approx(1)
    if n <= plots.COLUMNS:  # one column a client, in some order
        expected = sorted((counts / 60).tolist())
        assert np.array(sorted(shares.T.tolist())) == pytest.approx(np.array(expected))
        assert (np.diff(shares.argmax(0)) >= 0).all()
    else:
        assert shares.mean(1) == pytest.approx(counts.mean(0) / 60)


def test_distribution_counts_every_client_once(run):
    clients = load(run, "clients")
    federated, alone = plots.accuracy_distribution(clients).axes
    for ax in (federated, alone):
        assert sum(bar.get_height() for bar in ax.patches) == 20
    values = [c["accuracy"] for c in clients["clients"]]
    marks = sorted(line.get_xdata()[0] for line in federated.get_lines())
    assert marks == pytest.approx([numbers.worst_decile(values), np.mean(values)])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_names_of_mean_and_worst_tenth_do_not_overlap(values):
    figure = plots.accuracy_distribution({"clients": [{"accuracy": v} for v in values]})
    plots.to_svg(figure)  # lays it out
    left, right = sorted((t.get_window_extent() for t in figure.axes[0].texts), key=lambda box: box.x0)
    assert left.x1 < right.x0
    assert left.x0 >= figure.bbox.x0
    assert right.x1 <= figure.bbox.x1


def test_bytes_add_up(run):
    rows = rows_of(run)
    lines = [line for line in plots.bytes_moved(rows).axes[0].get_lines() if len(line.get_xdata()) > 1]
    for line, way in zip(lines, ("up", "down"), strict=True):
        assert line.get_ydata().tolist() == np.cumsum([row["bytes"][way] for row in rows]).tolist()


def test_comparison_bars_have_the_values(run):
    result = load(run, "result")
    widths = [bar.get_width() for bar in plots.comparison(result).axes[0].patches]
    baselines = result["baselines"]
    assert widths == [result["final"]["accuracy"], *(b["accuracy"] for b in baselines.values())]


def figures(folder):
    result, clients, rows = load(folder, "result"), load(folder, "clients"), rows_of(folder)
    yield plots.curves({"federated": rows}, "accuracy", result["baselines"])
    yield plots.curves({"federated": rows}, "loss", result["baselines"])
    yield plots.partition_heatmap(clients)
    yield plots.accuracy_distribution(clients, result["baselines"])
    yield plots.bytes_moved(rows)
    yield plots.comparison(result)


def test_svgs_share_a_page(run):
    ids = []
    for figure in figures(run):
        root = ElementTree.fromstring(plots.to_svg(figure))
        own = {e.get("id") for e in root.iter() if e.get("id")}
        text = ElementTree.tostring(root, "unicode")
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == own
        assert root.get("viewBox")
        assert root.get("aria-label")
        assert root.get("width") is None
        assert root.find(".//{*}text") is not None  # text stays text
        ids += own
    assert len(ids) == len(set(ids))


def test_svgs_are_themed(run):
    light = re.compile("|".join(theme.THEME))
    for figure in figures(run):
        outside = re.sub(r"var\([^)]*\)", "", plots.to_svg(figure))
        assert not light.search(outside)


def test_png_is_written(run, tmp_path):
    for i, figure in enumerate(figures(run)):
        plots.to_png(figure, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_global_is_touched_nor_heeded(run):
    before = dict(matplotlib.rcParams)
    html = report.render(run)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "xtick.bottom": False}):
        assert report.render(run) == html


def variables():
    """The CSS variables of the light and of the dark theme."""
    css = (Path(report.__file__).parent / "report.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in (light, dark)]


def contrast(one, other):
    """WCAG 2.2 contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_the_same_in_pictures_and_pages_and_can_be_read():
    light, dark = variables()
    for colour, name in theme.THEME.items():
        if match := re.match(r"var\(--(\w+)", name):
            assert light[match[1]] == colour
    assert light["ink"] == theme.INK
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        for name in scheme.keys() - {"page", "paper", "grid"}:
            assert contrast(scheme[name], scheme["paper"]) >= 4.5, name  # WCAG AA for text
