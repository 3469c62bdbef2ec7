from __future__ import annotations

import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coterie.cli import app
from coterie.cli.progress import display
from coterie.core.errors import ConfigError, CoterieError, DataError, Interrupted, QuorumLost
from coterie.experiment import Progress, Result, load, starter


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COTERIE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return starter.write(tmp_path)[0]


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="coterie")


def moment(**values: Any) -> Progress:
    return Progress(**{"folder": Path("runs/starter-1"), "round": 0, "rounds": 2, **values})


MOMENTS = [
    moment(note="trainer: loop (because) [b]", total=2),
    moment(done=1, total=2),
    moment(
        round=1, loss=0.5, accuracy=0.25, asked=2, answered=1, lost=1, bytes_up=1500, bytes_down=3000, eta=75
    ),
    moment(round=1, done=1, total=2),
    moment(round=2, loss=math.nan, asked=2, answered=2, lost=1, eta=0.0),
    moment(round=2, asked=2, answered=2, lost=1, note="baseline: 1 of 2"),
    moment(round=2, asked=2, answered=2, lost=1, note="baseline: 2 of 2"),
]


def result(status: str = "finished", error: str | None = None) -> Result:
    return Result(
        folder=Path("runs/starter-1"),
        name="starter",
        seed=7,
        task="classification",
        rounds=2,
        status=status,
        final={"loss": 0.125, "accuracy": 0.975},
        clients={"accuracy_mean": 0.96, "accuracy_worst_decile": 0.9},
        baselines={"centralised": {"accuracy": 0.98, "curve": []}, "local_only": {"accuracy": 0.7}},
        bytes={"up": 1, "down": 2},
        seconds={"total": 1.0, "train": 0.9},
        model_digest="sha256:00",
        error=error,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Replace experiment.run: show MOMENTS, then raise or return; the dict holds what it was called with."""

    def install(ending: Result | BaseException, moments: list[Progress] = MOMENTS) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def run(config: Any, **options: Any) -> Result:
            seen.update(options, config=config)
            for each in moments:
                options["watch"](each)
            if isinstance(ending, BaseException):
                raise ending
            return ending

        monkeypatch.setattr("coterie.experiment.run", run)
        return seen

    return install


def test_help_and_version_import_no_torch():
    script = (
        "import sys; from coterie.cli import app\n"
        "for arg in ['--help', '--version']:\n"
        "    assert not app([arg], prog_name='coterie', standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "run an experiment" in found.stdout.lower()
    assert "coterie 0." in found.stdout


def test_run_passes_its_options_on_and_prints_a_line_a_round(
    config: Path, fake: Callable[..., dict[str, Any]]
):
    seen = fake(result())
    found = invoke("run", config, "--set", "schedule.rounds=5", "--out", "o", "--data-dir", "d", "--resume")
    assert found.exit_code == 0, found.stderr
    assert seen["config"] == load(config, ["schedule.rounds=5"])
    assert (seen["out"], seen["data_dir"], seen["resume"]) == (Path("o"), Path("d"), True)
    lines = found.stdout.splitlines()
    assert lines[:4] == [
        "trainer: loop (because) [b]",
        "round 1/2  loss 0.5  accuracy 25.0 %  clients 1/2, 1 lost so far  "
        "up 1.5 kB, down 3.0 kB  1 min 15 s left",
        "round 2/2  loss nan  clients 2/2, 1 lost so far  up 0 bytes, down 0 bytes  0 s left",
        "baseline: 1 of 2",
    ]
    assert lines[4] == "finished: accuracy 97.5 %, loss 0.125"
    assert "centralised: accuracy 98.0 %" in lines[5]
    assert "local only: accuracy 70.0 %" in lines[6]
    assert "worst decile 90.0 %" in lines[7]
    assert lines[8] == f"report: {Path('runs/starter-1/report.html')}"
    assert len(lines) == 9
    assert "\x1b" not in found.stdout
    assert found.stderr == ""


def test_quiet_prints_only_the_end(config: Path, fake: Callable[..., dict[str, Any]]):
    fake(result())
    assert invoke("run", config, "-q").stdout.startswith("finished: accuracy 97.5 %")


def test_json_prints_an_object_a_round_and_the_result_last(config: Path, fake: Callable[..., dict[str, Any]]):
    fake(result())
    found = invoke("run", config, "--json")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in found.stdout.splitlines()]
    assert [line["round"] for line in lines[:-1]] == [1, 2]
    assert (lines[0]["accuracy"], lines[0]["folder"], lines[1]["loss"]) == (
        0.25,
        str(Path("runs/starter-1")),
        None,
    )
    assert lines[-1] == result().to_json()
    quiet = invoke("run", config, "--json", "--quiet").stdout
    assert json.loads(quiet) == result().to_json()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("krum must see each update", "use mean"), 2),
        (DataError("no such data set", "look"), 2),
        (QuorumLost("3 of 10 replied", "lower it"), 1),
        (CoterieError("else", ""), 1),
        (Interrupted("stopped in round 1"), 130),
    ],
)
def test_errors_print_cause_and_hint_and_set_the_exit_code(
    config: Path, fake: Callable[..., dict[str, Any]], error: CoterieError, code: int
):
    fake(error)
    found = invoke("run", config)
    assert found.exit_code == code
    assert found.stderr.splitlines()[0] == f"error: {error.args[0]}"
    assert found.stderr.splitlines()[1:] == ([f"hint: {error.hint}"] if error.hint else [])
    last = json.loads(invoke("run", config, "--json").stdout.splitlines()[-1])
    assert last["status"] == ("interrupted" if code == 130 else "failed")
    assert last["error"] == error.args[0]


def test_what_nobody_foresaw_is_one_line_unless_debug(
    config: Path, fake: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    fake(ZeroDivisionError("by [bold]zero"))
    found = invoke("run", config)
    assert found.exit_code == 1
    assert found.stderr.splitlines()[0] == "error: ZeroDivisionError: by [bold]zero"
    assert "Traceback" not in found.output
    monkeypatch.setenv("COTERIE_DEBUG", "0")
    assert "Traceback" not in invoke("run", config).output
    found = invoke("--debug", "run", config)
    assert found.exit_code == 1
    assert "Traceback" in found.stderr


def test_a_failed_result_is_exit_code_1(config: Path, fake: Callable[..., dict[str, Any]]):
    fake(result("failed", "NaN in the update of client-003"))
    found = invoke("run", config, "--json")
    assert found.exit_code == 1
    assert "error: NaN in the update of client-003" in found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["status"] == "failed"


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["runn"], "No such command 'runn'", "coterie --help"),
        (["run"], "Missing argument", "coterie run --help"),
        (["run", "experiment.toml", "--rounds", "3"], "No such option", "coterie run --help"),
        (["--colour"], "No such option", "coterie --help"),
        (["run", "experimnt.toml"], "experimnt.toml: there is no such file", "did you mean experiment.toml?"),
        (["run", "broken.toml"], "broken.toml:1:8:", "name ="),
        (["run", "experiment.toml", "--set", "schedul.rounds=3"], "schedul: unknown key", "'schedule'"),
        (["run", "experiment.toml", "--set", "schedule.round=3"], "schedule.round: unknown key", "'rounds'"),
        (
            ["run", "experiment.toml", "--set", "schedule.kind=synchronus"],
            "schedule.kind = 'synchronus'",
            "'synchronous'",
        ),
        (
            ["run", "experiment.toml", "--set", "algorithm.client.lr=fast"],
            "algorithm.client.lr = 'fast': expected a number",
            "",
        ),
        (
            ["run", "experiment.toml", "--set", "data.dataset.a=1"],
            "data.dataset = 'digits' is not a table",
            "",
        ),
        (["run", "experiment.toml", "--set", "data.dataset=digitz"], "data.dataset = 'digitz'", "'digits'"),
        (
            ["run", "experiment.toml", "--set", "data.partition.alpha=-1"],
            "data.partition: dirichlet(alpha=-1",
            "",
        ),
        (["compare", "nowhere"], "nowhere", ""),
        (["compare", ".", "--out", "x.pdf"], "must end in .html or .png", ""),
        (["data"], "", ""),
        (["data", "show", "digitz"], "data.dataset = 'digitz'", "'digits'"),
        (["data", "partition", "nowhere.toml"], "nowhere.toml: there is no such file", ""),
        (["data", "partition", "digits", "--out", "no/x.png"], "there is no folder no", ""),
        (["init"], "experiment.toml: is there already", "coterie init DIR"),
    ],
)
def test_bad_usage_and_bad_configs_exit_with_2(config: Path, args: list[str], message: str, hint: str):
    Path("broken.toml").write_text("name = \n")
    found = invoke(*args)
    assert found.exit_code == 2, found.output
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (message != "")
    assert message in "".join(errors)
    assert hint in found.stderr
    assert len(found.stderr.splitlines()) <= 3
    assert not Path("runs").exists()


def test_ctrl_c_asks_the_run_to_stop_and_says_how_to_resume(config: Path, monkeypatch: pytest.MonkeyPatch):
    def run(
        config: Any, *, stop: Callable[[], bool], watch: Callable[[Progress], None], **options: Any
    ) -> Result:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        watch(moment(folder=Path("runs/my run-3")))
        raise Interrupted("stopped in round 1")

    monkeypatch.setattr("coterie.experiment.run", run)
    before = signal.getsignal(signal.SIGINT)
    found = invoke("run", config, "--set", "name='my run'", "--set", "name=my-run", "--data-dir", "d")
    assert signal.getsignal(signal.SIGINT) == before
    assert found.exit_code == 130, found.output
    hint = next(line for line in found.stderr.splitlines() if line.startswith("hint: resume with: "))
    words = shlex.split(hint.removeprefix("hint: resume with: "))
    again = ["--set", "name='my run'", "--set", "name=my-run", "--data-dir", "d", "--out", "runs/my run-3"]
    assert words == ["coterie", "run", str(config), *again, "--resume"]


def test_ctrl_c_twice_kills():
    script = (
        "import os, signal\n"
        "from coterie.cli.run import stoppable\n"
        "with stoppable() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still alive')\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == -signal.SIGINT
    assert found.stdout == ""
    assert "press Ctrl-C again" in found.stderr


@pytest.mark.parametrize(("count", "last"), [(5, "round 2/2"), (7, "baseline: 2 of 2")])
def test_a_terminal_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch, count: int, last: str):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with display(as_json=False, quiet=False) as watch:
        for each in MOMENTS[:count]:
            watch(each)
    shown = screen.getvalue()
    assert shown.count("trainer: loop (because) [b]") == 1
    frame = shown.splitlines()[-2]
    assert last in frame
    assert "clients 2/2, 1 lost so far" in frame
    assert "\x1b[?25h" in shown  # the cursor is back


def test_data_commands_agree_with_each_other(config: Path):
    listed = json.loads(invoke("data", "list", "--json").stdout)
    assert {"digits", "mnist"} <= {part["kind"] for part in listed["dataset"]}
    dirichlet = next(part for part in listed["partition"] if part["kind"] == "dirichlet")
    assert {"clients", "alpha"} <= {each["name"] for each in dirichlet["settings"] if each["required"]}
    assert "dirichlet" in invoke("data", "list").stdout
    shown = json.loads(invoke("data", "show", "digits", "--json").stdout)
    assert (shown["train"] + shown["test"], shown["input_shape"]) == (1797, [1, 8, 8])
    assert "1, 8, 8" in invoke("data", "show", "digits").stdout

    found = json.loads(
        invoke("data", "partition", "digits", "--json", "--set", "data.partition.clients=7").stdout
    )
    assert len(found["clients"]) == 7
    assert sum(client["train"] for client in found["clients"]) == shown["train"]
    assert all(sum(client["labels"]) == client["train"] for client in found["clients"])
    text = invoke("data", "partition", config).stdout
    assert "digits, dirichlet: 20 clients, 10 labels" in text
    assert len([line for line in text.splitlines() if line.startswith("client-")]) == 20


def test_data_partition_draws(config: Path):
    assert invoke("data", "partition", config, "--out", "p.png").exit_code == 0
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert invoke("data", "partition", config, "--out", "p.html").exit_code == 0
    assert "<svg" in Path("p.html").read_text()


def test_doctor(config: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    (config.parent / "sets" / "mnist").mkdir(parents=True)
    monkeypatch.setenv("COTERIE_DATA", os.pathsep.join([str(config.parent / "sets"), "nowhere"]))
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu"
    assert found["data"] == {str(config.parent / "sets"): ["mnist"], "nowhere": None}
    assert found["extras"]["tensorboard"]["install"] == "pip install 'coterie[tensorboard]'"
    text = invoke("doctor").stdout
    assert torch.__version__ in text
    assert "no such folder" in text


def test_the_starter_runs_resumes_and_compares(config: Path):
    short = ("--set", "schedule.rounds=2", "--set", "compare=[]")
    first = invoke("run", config, *short)
    assert first.exit_code == 0, first.output
    assert "round 2/2" in first.stdout
    assert Path("runs/starter-1/report.html").is_file()
    second = invoke("run", config, *short, "--json", "--out", "other")
    lines = [json.loads(line) for line in second.stdout.splitlines()]
    assert lines[-1] == json.loads(Path("other/result.json").read_text())
    assert (
        lines[-1]["model_digest"]
        == json.loads(Path("runs/starter-1/result.json").read_text())["model_digest"]
    )

    longer = invoke(
        "run",
        config,
        "--set",
        "schedule.rounds=3",
        "--set",
        "compare=[]",
        "--out",
        "other",
        "--resume",
        "--json",
    )
    assert longer.exit_code == 0, longer.output
    assert json.loads(longer.stdout.splitlines()[-1])["rounds"] == 3

    rows = [
        json.loads(line)
        for line in invoke("compare", "runs/starter-1", "other", "--json").stdout.splitlines()
    ]
    assert [row["rounds"] for row in rows] == [2, 3]
    for name, start in [("c.html", b"<!doctype html>"), ("c.png", b"\x89PNG")]:
        found = invoke("compare", "runs/starter-1", "other", "--out", name)
        assert found.exit_code == 0, found.output
        assert "fedavg" in found.stdout
        assert Path(name).read_bytes().startswith(start)
