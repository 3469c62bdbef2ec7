"""Sweeps: the cells, the arithmetic, the table and its page; kills, failures and resuming with real processes."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import coterie as ct
from coterie.cli import app
from coterie.cli.sweep import _display
from coterie.experiment import SweepProgress, run
from coterie.experiment.estimates import estimate, student_t
from coterie.experiment.grid import base, cells, describe, short_names, show_axes, split, toml
from coterie.experiment.sweep import check, tabulate

SWEEP = sys.modules["coterie.experiment.sweep"]  # the room's name for it is the function
DATA = """
import torch
from torch.utils.data import TensorDataset

def blobs(seed=0, n=120):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return TensorDataset(torch.randn(n, 2, generator=draw) + 3 * torch.eye(3)[y][:, :2], y)
"""
CONFIG = """
name = "blobs"
seed = 3
[data]
dataset = "blobs.py:blobs"
partition = { kind = "iid", clients = 4 }
holdout = 0.2
[model]
kind = "softmax"
[algorithm]
kind = "fedavg"
client = { lr = 0.1, batch_size = 10 }
[schedule]
kind = "synchronous"
rounds = 20
cohort = 2
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    (tmp_path / "blobs.py").write_text(DATA)
    path = tmp_path / "blobs.toml"
    path.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return path


def invoke(*args):
    return CliRunner().invoke(app, ["sweep", *map(str, args)], prog_name="coterie")


# The arithmetic


def test_student_t_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="the oracle is scipy")
    for freedom in [*range(1, 40), 99, 100, 1001]:
        for inside in (0.5, 0.9, 0.95, 0.999):
            exact = stats.t.ppf((1 + inside) / 2, freedom)
            assert student_t(freedom, inside) == pytest.approx(exact, rel=1e-11)


def test_student_t_has_its_closed_forms():
    assert student_t(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_an_interval_is_numpys(values):
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    half = student_t(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.half == pytest.approx(half, rel=1e-6, abs=1e-6)


def test_95_percent_of_intervals_hold_the_mean():
    draws = np.random.default_rng(5).normal(2, 3, (4000, 4))
    held = np.mean([abs(each.mean - 2) <= each.half for each in map(estimate, draws.tolist())])
    assert held == pytest.approx(0.95, abs=0.014)  # 4 standard errors: a false alarm in 16,000 seeds


def test_one_value_has_no_interval_and_none_no_mean():
    assert estimate([2.5]) == (2.5, None, 1)
    assert estimate([]) is None


def test_the_table_takes_means_over_seeds_and_marks_the_best():
    nothing = dict.fromkeys(("loss", "client_mean", "worst_decile", "bytes", "seconds"))
    found = [("a", 0.1), ("a", 0.3), ("b", 0.5), ("b", None), ("c", 0.9)]
    records = [
        {"kind": kind, "status": "finished" if value else "failed", "accuracy": value, **nothing}
        | ({} if value else {"error": "no"})
        for kind, value in found
    ]
    records[-1] |= {"status": "finished"}
    rows = tabulate(records, ["kind"], "accuracy")
    assert [(row["kind"], row["accuracy"], row["seeds"], row["of"]) for row in rows] == [
        ("a", pytest.approx(0.2), 2, 2),
        ("b", 0.5, 1, 2),
        ("c", 0.9, 1, 1),
    ]
    # two values: s = |x - y| / sqrt(2), so the half-width is t(1) * |x - y| / 2
    assert rows[0]["accuracy_ci"] == pytest.approx(math.tan(math.pi * 0.475) * 0.1)
    assert [row["best"] for row in rows] == [False, False, True]
    assert [row["errors"] for row in rows] == [[], ["no"], []]


# The cells


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1,2, 3", ["1", "2", "3"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ('{kind="x",alpha=[1,2]},{kind="y"}', ['{kind="x",alpha=[1,2]}', '{kind="y"}']),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("don't,do", ["don't", "do"]),
        ("", [""]),
    ],
)
def test_commas_inside_brackets_and_quotes_do_not_split(text, pieces):
    assert split(text) == pieces


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text("ab,\"'\\[{é\n =#"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.c", min_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(VALUES, min_size=1, max_size=3))
def test_values_survive_the_way_through_toml(values):
    import tomllib

    texts = [toml(value) for value in values]
    assert [tomllib.loads(f"v = {text}")["v"] for text in texts] == values
    assert split(",".join(texts)) == texts


def test_cells_are_all_combinations_seeds_innermost(config):
    grid = ["algorithm.client.lr=0.1,0.5", 'data.partition={kind="iid",clients=4},{kind="iid",clients=6}']
    found = cells(config, grid, 2, ["schedule.rounds=2"])
    assert [tuple(cell.values.values()) for cell in found] == [
        (lr, {"kind": "iid", "clients": clients}, seed)
        for lr in (0.1, 0.5)
        for clients in (4, 6)
        for seed in (3, 4)
    ]
    assert {cell.config.schedule["rounds"] for cell in found} == {2}
    assert len({cell.name for cell in found}) == 8
    assert found[0].name.startswith("lr=0.1,partition=iid-clients-4-")
    assert all("/" not in cell.name and "{" not in cell.name for cell in found)
    in_python = {
        "algorithm.client.lr": np.array([0.1, 0.5]),
        "data.partition": [{"kind": "iid", "clients": n} for n in (4, 6)],
        "seed": range(3, 5),
    }
    assert cells(config, in_python, None, ["schedule.rounds=2"]) == found
    assert cells(ct.load(config), in_python, None, ["schedule.rounds=2"]) == found
    assert cells(config, ["seed=3,4"]) == cells(config, (), 2) == cells(config, (), [3, 4])


def test_the_base_is_what_cells_share(config):
    found = cells(config, ["algorithm.client.lr=0.1,0.5", "schedule.rounds=1,2"], 2)
    before = [dataclasses.asdict(cell.config) for cell in found]
    shared = base(found[0])
    assert all(base(cell) == shared for cell in found)
    assert shared["algorithm"]["client"] == {"batch_size": 10}
    assert "seed" not in shared
    assert [dataclasses.asdict(cell.config) for cell in found] == before


def test_names_are_short_where_they_can_be():
    paths = ["algorithm.client.lr", "algorithm.server.lr", "seed"]
    assert list(short_names(paths).values()) == ["client.lr", "server.lr", "seed"]
    assert describe({"algorithm.client.lr": 0.1, "seed": 7}) == "lr = 0.1, seed = 7"
    tables = [{"kind": "iid", "n": 5}, {"kind": "dirichlet", "n": 5, "alpha": 0.1}]
    assert list(show_axes({"p": tables})["p"].values()) == ["iid", "dirichlet(alpha=0.1)"]
    assert show_axes({"p": tables[:1]}) == {"p": {repr(tables[0]): "iid(n=5)"}}


# Bad input: one error, exit code 2, and nothing is written


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        ([], "nothing to sweep over", "--grid"),
        (["--grid", "algorithm.client.lr"], "expected a.b=1,2,3", "for example"),
        (["--grid", "algorithm.client.lr=0.1,"], "a value is missing", ""),
        (["--grid", "algorithm.client.lr=[1,2"], "[ is not closed", ""),
        (["--grid", "seed=1", "--grid", "seed=2"], "--grid seed is given twice", "one --grid"),
        (["--grid", "seed=1,2", "--seeds", "2"], "seeds are given twice", ""),
        (["--grid", "seed=1,1"], "seed = 1 is there twice", ""),
        (["--grid", "seed=one"], "seed = 'one': expected a whole number", ""),
        (["--seeds", "0"], "--seeds 0: must be >= 1", ""),
        (["--seeds", "2", "--jobs", "0"], "--jobs 0: must be >= 1", ""),
        (
            ["--grid", "algorithm.client.lr=0.1,fast"],
            "lr = 'fast': expected a number (in the cell lr = fast)",
            "",
        ),
        (["--grid", "algorithm.client.lr=0.1,-1"], "(in the cell lr = -1)", ""),
        (["--grid", "algorithm.clinet.lr=0.1,1"], "algorithm.clinet: unknown key", ""),
        (["--grid", "name.a=1,2"], "--grid name.a=1: name = 'blobs' is not a table", ""),
        (["--grid", "schedule.kind=synchronous,synchronus"], "'synchronus'", "'synchronous'"),
        (["--seeds", "2", "--out", "."], "not an empty folder, nor a sweep's", "another folder"),
    ],
)
def test_bad_input_is_one_error_before_anything_runs(config, args, message, hint):
    found = invoke(config, *args)
    assert found.exit_code == 2, found.output
    (error,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert message in error
    assert hint in found.stderr
    assert not Path("sweeps").exists()


def test_a_config_that_is_not_there(tmp_path):
    assert invoke(tmp_path / "no.toml", "--seeds", 2).exit_code == 2


def test_a_grid_in_python_is_checked(config):
    for grid in ({"seed": 3}, {"model.kind": "mlp"}, "seed=1,2", {"seed": [object()]}, {"seed": []}):
        with pytest.raises(ct.ConfigError):
            cells(config, grid)


def test_check_assembles_each_combination_once(config, monkeypatch):
    made = []
    monkeypatch.setattr(SWEEP, "assemble", lambda config, **given: made.append(given["dataset"]))
    check(cells(config, ["algorithm.client.lr=0.1,0.5"], 3))
    assert len(made) == 2
    assert made[0] is made[1]


# Without a process: cells that have all finished


@pytest.fixture
def swept(config, make_run, tmp_path):
    """A sweep over two axes and two seeds whose cells are there already."""
    options = {
        "grid": {"algorithm.client.lr": [0.1, 0.5], "schedule.cohort": [2, 4]},
        "seeds": 2,
        "out": tmp_path / "made",
    }
    todo = cells(config, options["grid"], 2)
    out = options["out"]
    out.mkdir()
    state = {"base": base(todo[0]), "axes": {path: [] for path in todo[0].values}}
    (out / "sweep.json").write_text(json.dumps(state))
    for index, cell in enumerate(todo):
        make_run(out / cell.name, rounds=6, clients=4, top=0.8 + 0.02 * index, name="<b>blobs")
    return options


def test_a_finished_sweep_is_only_shown(config, swept):
    shown = []
    result = ct.sweep(config, **swept, watch=shown.append)
    assert [moment.status for moment in shown] == ["checking"] + ["found"] * 8
    assert [row["seeds"] for row in result.rows] == [2] * 4
    finals = [json.loads((result.folder / cell["cell"] / "result.json").read_text()) for cell in result.cells]
    accuracies = np.array([final["final"]["accuracy"] for final in finals]).reshape(4, 2)
    assert [row["accuracy"] for row in result.rows] == pytest.approx(accuracies.mean(1))
    halves = student_t(1) * accuracies.std(1, ddof=1) / math.sqrt(2)
    assert [row["accuracy_ci"] for row in result.rows] == pytest.approx(halves)
    assert [row["best"] for row in result.rows] == [False, False, False, True]
    assert json.loads((result.folder / "sweep.json").read_text()) == json.loads(json.dumps(result.to_json()))
    with (result.folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy_ci"]) for row in rows] == pytest.approx(halves)
    with (result.folder / "cells.csv").open() as file:
        assert [row["cell"] for row in csv.DictReader(file)] == [cell["cell"] for cell in result.cells]
    page = (result.folder / "sweep.html").read_text()
    assert page.count("<svg") == 3
    assert "Best: lr = 0.5, cohort = 4" in page
    assert page.count("/report.html") == 8
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")


def test_the_command_prints_the_table(config, swept):
    args = [config, "--out", swept["out"], "--seeds", 2]
    for path, values in swept["grid"].items():
        args += ["--grid", f"{path}={','.join(map(str, values))}"]
    found = invoke(*args)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].startswith("8 cells, ")
    assert lines[8].startswith("8/8  lr=0.5,cohort=4,seed=4  finished before")
    table = [line for line in lines if "±" in line]
    assert len(table) == 4
    assert table[3].split()[:3] == ["0.5", "4", "2"]
    assert [line.endswith("best") for line in map(str.rstrip, table)] == [False, False, False, True]
    rows = [json.loads(line) for line in invoke(*args, "--json").stdout.splitlines()]
    assert [(row["algorithm.client.lr"], row["schedule.cohort"]) for row in rows] == [
        (0.1, 2), (0.1, 4), (0.5, 2), (0.5, 4),
    ]  # fmt: skip
    assert rows[3]["best"]


def test_another_sweep_is_refused_and_a_larger_one_is_not(config, swept):
    with pytest.raises(ct.ConfigError, match=r"schedule\.rounds was 20, now it is 21"):
        ct.sweep(config, **swept, overrides=["schedule.rounds=21"])
    with pytest.raises(
        ct.ConfigError, match=r"holds a sweep over .*cohort, seed; this one is over .*lr, seed"
    ):
        ct.sweep(config, **{**swept, "grid": {"algorithm.client.lr": [0.1]}})
    smaller = ct.sweep(config, **{**swept, "seeds": 1})
    assert [row["seeds"] for row in smaller.rows] == [1] * 4
    assert smaller.rows[0]["accuracy_ci"] is None
    assert [row["seeds"] for row in ct.sweep(config, **swept).rows] == [2] * 4


@pytest.mark.parametrize(
    ("grid", "pictures"),
    [
        ({}, 2),
        ({"algorithm.kind": ["fedavg", "fedprox"]}, 3),
        (
            {"algorithm.client.lr": [0.1 * n for n in range(1, 8)], "schedule.cohort": [1, 2, 3, 4, 5, 6, 7]},
            3,
        ),
        ({"model.kind": ["softmax", "mlp"], "run.threads": [1, 2, 3, 4], "schedule.cohort": [1, 2, 3, 4]}, 2),
    ],
)
def test_every_shape_of_sweep_has_its_pictures(config, grid, pictures, make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(SWEEP, "check", lambda todo, data: None)
    out, whole = tmp_path / "made", make_run(tmp_path / "one", rounds=3, clients=3)
    todo = cells(config, grid, 1)
    for cell in todo:
        shutil.copytree(whole, out / cell.name)
    state = {"base": base(todo[0]), "axes": {path: [] for path in todo[0].values}}
    (out / "sweep.json").write_text(json.dumps(state))
    ct.sweep(config, grid, seeds=1, out=out)
    assert (out / "sweep.html").read_text().count("<svg") == pictures


def test_a_terminal_gets_live_bars(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    two = {"cells": 2, "jobs": 2}
    with _display(hidden=False) as watch:
        watch(SweepProgress(status="checking", done=0, **two))
        watch(SweepProgress(status="running", done=0, cell="a[b]=1", round=1, rounds=4, accuracy=0.5, **two))
        watch(SweepProgress(status="failed", done=1, cell="a[b]=1", error="no [x]", **two))
        watch(SweepProgress(status="running", done=1, cell="a[b]=2", round=1, rounds=4, accuracy=0.25, **two))
    shown = screen.getvalue()
    assert shown.count("1/2  a[b]=1  failed: no [x]") == 1
    assert "1/2 cells, 2 at a time" in shown.splitlines()[-3]
    assert "a[b]=2" in shown.splitlines()[-2]
    assert "round 1/4  accuracy 25.0 %" in shown.splitlines()[-2]


# With real processes


def alive(folder):
    """The processes at work in the folder: {pid: command}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        if "coterie" in command and str(folder) in command and int(path.parent.name) != os.getpid():
            found[int(path.parent.name)] = command
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def half_done(out):
    """The cells that have begun their rounds and not ended."""
    rows = {path.parent: path.read_text().count("\n") for path in out.glob("*/metrics.jsonl")}
    return [cell.name for cell, n in rows.items() if n > 2 and not (cell / "result.json").exists()]


linux = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


@linux
def test_killed_and_interrupted_sweeps_leave_no_process_and_end_with_the_same_bits(config, monkeypatch):
    config.write_text(CONFIG.replace("rounds = 20", "rounds = 120"))  # long enough to be met half done
    out = config.parent / "swept"
    grid = "algorithm.client.lr=0.1,0.5"
    command = [sys.executable, "-m", "coterie", "sweep", str(config), "--grid", grid, "--seeds", "2"]
    command += ["--out", str(out), "--jobs", "2"]

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sweeping:
        wait_for(lambda: half_done(out) or sweeping.poll() is not None, seconds=120)
        sweeping.kill()
    wait_for(lambda: not alive(out), seconds=20)  # one that was still importing ends when it has
    assert half_done(out)

    def press_ctrl_c(moment):
        if moment.done and moment.status == "running" and 2 < moment.round < moment.rounds:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"grid": [grid], "seeds": 2, "out": out, "jobs": 2}
    with pytest.raises(ct.Interrupted, match="of 4 cells have ended"):
        ct.sweep(config, **options, watch=press_ctrl_c)
    assert not alive(out)
    assert half_done(out)
    finished = {path.parent.name for path in out.glob("*/result.json")}
    assert 1 <= len(finished) < 4
    times = {name: (out / name / "result.json").stat().st_mtime_ns for name in finished}

    shown = []
    result = ct.sweep(config, **options, watch=shown.append)
    assert {moment.cell for moment in shown if moment.status == "found"} == finished
    assert all((out / name / "result.json").stat().st_mtime_ns == when for name, when in times.items())
    assert [cell["status"] for cell in result.cells] == ["finished"] * 4
    assert not alive(out)
    monkeypatch.setattr("coterie.experiment.report.write", lambda folder: None)
    for cell, record in zip(cells(config, [grid], 2), result.cells, strict=True):
        whole = run(cell.config, out=out.parent / "whole" / cell.name)
        assert record["model_digest"] == whole.model_digest
        assert record["accuracy"] == whole.final["accuracy"]


@linux
def test_cells_that_fail_do_not_stop_the_others(config):
    grid, out = {"algorithm.client.lr": [1e30, 0.1]}, config.parent / "failing"
    killed = []

    def watch(moment):
        if moment.status == "running" and moment.cell == "lr=0.1" and not killed:
            (pid,) = [pid for pid, command in alive(out).items() if command.strip().endswith("lr=0.1")]
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    result = ct.sweep(config, grid, out=out, jobs=2, watch=watch, overrides=["schedule.rounds=400"])
    assert [cell["status"] for cell in result.cells] == ["failed", "failed"]
    assert "it has diverged" in result.cells[0]["error"]
    assert "killed by SIGKILL" in result.cells[1]["error"]
    assert [(row["seeds"], row["best"]) for row in result.rows] == [(0, False), (0, False)]
    page = (out / "sweep.html").read_text()
    assert "2 of 2 failed" in page
    assert "it has diverged" in page
    assert "diverged" in (out / "cells.csv").read_text()
