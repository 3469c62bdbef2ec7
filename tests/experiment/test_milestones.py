"""Time to accuracy and who answered: right from hand-written metrics, in the report and in `compare`."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from coterie.cli import app
from coterie.experiment import milestones as m
from coterie.experiment import plots, report

# round, time, accuracy, bytes up, asked, answered, why lost
HISTORY = [
    (1, 3.0, 0.30, 100, 6, 4, {"late": 2}),
    (2, 4.5, None, 200, 6, 6, {}),
    (3, 90.0, 0.55, 300, 6, 3, {"late": 1, "offline": 1}),
    (4, 95.0, 0.45, 400, 6, 6, {}),
    (5, 7300.0, 0.80, 500, 6, 4, {"dropped out": 2}),
    (6, 7400.0, 0.75, 600, 6, 6, {}),
]


def row(round, time, accuracy, up, asked, answered, why):
    lost = sum(why.values())
    made = {
        "round": round,
        "version": round,
        "time": time,
        "seconds": 0.1 * round,
        "train_loss": 1 / round,
        "clients": {"asked": asked, "answered": answered, "lost": lost},
        "lost_why": why,
        "bytes": {"up": up, "down": 2 * up},
    }
    return made if accuracy is None else {**made, "loss": 1 - accuracy, "accuracy": accuracy}


ROWS = [row(*each) for each in HISTORY]


@pytest.fixture
def run(tmp_path):
    def write(name="run", rows=ROWS):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        (folder / "result.json").write_text(json.dumps({"name": name, "status": "finished"}))
        return folder

    return write


def test_when_each_level_was_first_reached():
    assert m.milestones(ROWS, (0.3, 0.5, 0.8, 0.9)) == [
        (0.3, 1, 3.0, 100.0),
        (0.5, 3, 90.0, 600.0),
        (0.8, 5, 7300.0, 1500.0),
        (0.9, None, None, None),
    ]
    assert m.milestones([], (0.5,)) == [m.Milestone(0.5)]


def test_values_that_are_no_numbers_reach_nothing():
    rows = [
        {"round": 1, "accuracy": float("nan")},
        {"round": 2, "accuracy": None},
        {"round": 3, "accuracy": 0.9},
    ]
    assert m.milestones(rows, (0.5,)) == [m.Milestone(0.5, 3, None, 0.0)]


def test_levels_are_the_last_that_were_reached():
    assert m.levels(ROWS) == (0.4, 0.5, 0.6, 0.7, 0.8)
    assert m.levels(ROWS[:1]) == (0.1, 0.2, 0.3)
    assert m.levels([{"round": 1, "accuracy": 0.991}]) == (0.9, 0.95, 0.97, 0.98, 0.99)
    assert m.levels([{"round": 1, "loss": 0.1}]) == ()


def test_what_the_clock_says():
    default = [{"round": r, "time": float(r)} for r in range(1, 5)]
    constant = [{"round": r, "time": 2.5 * r} for r in range(1, 5)]
    assert [(m.timed(rows), m.uneven(rows)) for rows in (default, constant, ROWS, [])] == [
        (False, False),
        (True, False),
        (True, True),
        (False, False),
    ]


def test_the_report_tells_time_to_accuracy(run):
    html = report.render(run()).replace("\u00a0", " ")
    for level, *cells in (
        ("40.0 %", "3", "1 min 30 s", "600 B"),
        ("50.0 %", "3", "1 min 30 s", "600 B"),
        ("80.0 %", "5", "2 h 1 min", "1.5 kB"),
    ):
        said = f'<th scope="row">{level}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
        assert said in html
    assert 'aria-label="Accuracy over virtual time"' in html
    assert 'aria-label="Clients answered and lost by round"' in html


def test_a_run_without_simulated_devices_has_no_clock_to_show(run):
    rows = [{**each, "time": float(each["round"]), "lost_why": {}} for each in ROWS]
    html = report.render(run(rows=rows))
    assert "Time to accuracy" in html
    assert "virtual time" not in html
    assert "Who answered" not in html


def test_a_regression_shows_its_loss_over_time(run):
    rows = [{k: v for k, v in each.items() if k != "accuracy"} for each in ROWS]
    html = report.render(run(rows=rows))
    assert 'aria-label="Loss over virtual time"' in html
    assert "Time to accuracy" not in html


def test_the_curve_over_time_is_in_the_unit_of_its_axis():
    ax = plots.curves({"federated": ROWS}, "accuracy", over="time").axes[0]
    line = ax.get_lines()[0].get_xydata()
    expected = [(time / 3600, accuracy) for _, time, accuracy, *_ in HISTORY if accuracy is not None]
    assert line == pytest.approx(np.array(expected))
    assert ax.get_xlabel() == "virtual time (h)"


def test_baselines_have_no_clock_and_are_levels():
    central = {"accuracy": 0.9, "curve": [{"round": 1, "accuracy": 0.5}]}
    ax = plots.curves({"federated": ROWS}, "accuracy", {"centralised": central}, "time").axes[0]
    assert [line.get_ydata() for line in ax.get_lines()][-1] == [0.9, 0.9]


def test_who_answered_adds_up_to_who_was_asked():
    figure = plots.answers(ROWS)
    bands = {}
    for patch, text in zip(figure.axes[0].patches, figure.axes[0].texts, strict=True):
        values, _, baseline = patch.get_data()
        bands[text.get_text()] = (values - baseline).tolist()
    assert bands == {
        "answered 29": [4, 6, 3, 6, 4, 6],
        "not waited for 1": [0, 0, 1, 0, 0, 0],
        "dropped out 2": [0, 0, 0, 0, 2, 0],
        "late 3": [2, 0, 1, 0, 0, 0],
        "offline 1": [0, 0, 1, 0, 0, 0],
    }
    assert figure.axes[0].patches[-1].get_data()[0].tolist() == [6] * 6


def test_reasons_are_untrusted_text(run):
    why = {"<script>alert(1)</script>": 1, "$x^$": 2, "\ud800": 1, "many": "words"}
    html = report.render(run(rows=[{**ROWS[0], "lost_why": why}]))
    assert "<script" not in html
    assert "$x^$" in html


def invoke(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)], prog_name="coterie")


def test_compare_sets_times_to_accuracy_side_by_side(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    slow = [{**each, "time": 10 * each["time"]} for each in ROWS[:3]]
    folders = run("fast"), run("slow", slow)
    out = tmp_path / "compare.html"
    done = invoke(*folders, "--reach", 0.5, "--reach", 0.8, "--out", out)
    assert done.exit_code == 0
    lines = [line.replace("\u00a0", " ") for line in done.stdout.splitlines()]
    assert "to 50.0 %" in lines[0]
    assert "1 min 30 s, round 3, 600 B up" in lines[1]
    assert "2 h 1 min, round 5, 1.5 kB up" in lines[1]
    assert "15 min 0 s, round 3, 600 B up" in lines[2]
    assert lines[2].rstrip().endswith("–")
    html = out.read_text().replace("\u00a0", " ")
    assert "<td>15 min 0 s, round 3, 600 B up</td><td>–</td>" in html
    assert 'aria-label="Accuracy over virtual time"' in html


def test_compare_as_json(run):
    done = invoke(run(), "--reach", 0.5, "--reach", 0.9, "--json")
    assert json.loads(done.stdout)["reached"] == [
        {"accuracy": 0.5, "round": 3, "time": 90.0, "bytes_up": 600.0},
        {"accuracy": 0.9, "round": None, "time": None, "bytes_up": None},
    ]
    assert "reached" not in json.loads(invoke(run("other"), "--json").stdout)


@pytest.mark.parametrize("level", [0, -0.5, 90])
def test_levels_are_shares(run, level):
    done = invoke(run(), "--reach", level)
    assert done.exit_code == 2
    assert f"--reach {level:g}: must be in (0, 1]" in done.stderr
