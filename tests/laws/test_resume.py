"""Law 3: kill a run anywhere and start it again, and it ends with the same bits."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from coterie.core import ConfigError, Interrupted, QuorumLost
from coterie.experiment import run, to_toml
from coterie.storage import Checkpoints, RunFolder

ALL = [
    "synchronous", "adam", "scaffold", "stragglers", "hierarchical", "krum", "buffered", "asynchronous",
    "gossip", "batchnorm",
]  # fmt: skip


class Crash(BaseException):
    """The power goes: nothing of the library may catch this and tidy up."""


def crash_after(events):
    """A watch that lets so many calls pass."""
    calls = iter(range(events))

    def watch(progress):
        if next(calls, None) is None:
            raise Crash

    return watch


def timeless_rows(folder):
    """The metrics without wall-clock times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder.open(folder).rows()]


@pytest.mark.parametrize("kind", ALL)
def test_crash_after_any_event(kind, experiment, tmp_path, unreported):
    config = experiment(kind)
    calls = []
    whole = run(config, out=tmp_path / "whole", watch=calls.append)
    rows = timeless_rows(whole.folder)
    for point in range(1, len(calls), 4):
        out = tmp_path / f"at-{point}"
        with pytest.raises(Crash):
            run(config, out=out, watch=crash_after(point))
        resumed = run(config, out=out, resume=True)
        assert resumed.model_digest == whole.model_digest, point
        assert timeless_rows(out) == rows, point


def test_crash_after_crash(experiment, tmp_path, unreported):
    """A run that never gets further than a few events at a time still ends with the same bits."""
    config = experiment("scaffold")
    whole = run(config, out=tmp_path / "whole")
    out, resume = tmp_path / "crashing", False
    for _ in range(30):
        try:
            ended = run(config, out=out, resume=resume, watch=crash_after(9))
            break
        except Crash:
            resume = True
    assert ended.model_digest == whole.model_digest


@pytest.mark.parametrize("kind", ["scaffold", "buffered"])
def test_sparse_checkpoints(kind, experiment, tmp_path, unreported):
    settings = {"evaluate_clients": False, "checkpoint_every": 3, "keep_checkpoints": 1}
    config = experiment(kind, run=settings)
    whole = run(config, out=tmp_path / "whole")
    for point in (8, 14, 20):
        with pytest.raises(Crash):
            run(config, out=tmp_path / str(point), watch=crash_after(point))
        assert run(config, out=tmp_path / str(point), resume=True).model_digest == whole.model_digest
        assert timeless_rows(tmp_path / str(point)) == timeless_rows(whole.folder)


def test_a_damaged_newest_checkpoint_costs_a_round_and_no_bit(experiment, tmp_path, unreported):
    config = experiment("scaffold")
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(Crash):
        run(config, out=tmp_path / "cut", watch=crash_after(20))
    number, _, _ = Checkpoints(tmp_path / "cut" / "checkpoints").latest()
    newest = tmp_path / "cut" / "checkpoints" / f"round-{number:06d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run(config, out=tmp_path / "cut", resume=True).model_digest == whole.model_digest


def test_an_interrupted_run_says_so_and_goes_on(experiment, tmp_path):
    config = experiment("synchronous")
    whole = run(config, out=tmp_path / "whole")
    asked = iter([False] * 8)
    with pytest.raises(Interrupted, match="--resume"):
        run(config, out=tmp_path / "cut", stop=lambda: next(asked, True))
    told = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert (told["status"], told["rounds"]) == ("interrupted", 1)
    assert (tmp_path / "cut" / "report.html").exists()
    done = run(config, out=tmp_path / "cut", resume=True)
    assert (done.status, done.model_digest) == ("finished", whole.model_digest)


def test_more_rounds_later_equal_more_rounds_at_once(experiment, tmp_path, unreported):
    whole = run(experiment("scaffold"), out=tmp_path / "whole")
    fewer = {**experiment("scaffold").schedule, "rounds": 2}
    run(experiment("scaffold", schedule=fewer), out=tmp_path / "part")
    assert run(experiment("scaffold"), out=tmp_path / "part", resume=True).model_digest == whole.model_digest


def test_below_the_quorum_the_run_stops_and_a_lower_quorum_goes_on(experiment, tmp_path, unreported):
    strict = {**experiment("synchronous").schedule, "quorum": 5}
    system = {"drop_out": 0.3}
    with pytest.raises(QuorumLost, match=r"of 5 clients replied, the quorum is 5"):
        run(experiment("synchronous", schedule=strict, system=system), out=tmp_path / "r")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "failed"
    done = run(experiment("synchronous", system=system), out=tmp_path / "r", resume=True)
    whole = run(experiment("synchronous", system=system), out=tmp_path / "whole")
    assert done.model_digest == whole.model_digest


def test_another_experiment_is_not_resumed(experiment, tmp_path, unreported):
    with pytest.raises(Crash):
        run(experiment("synchronous"), out=tmp_path / "r", watch=crash_after(9))
    with pytest.raises(ConfigError, match=r"\[seed\] is not what the run was started with"):
        run(experiment("synchronous", seed=4), out=tmp_path / "r", resume=True)
    with pytest.raises(ConfigError, match="not an empty folder"):
        run(experiment("synchronous"), out=tmp_path / "r")


def command(config, out, *more):
    return [sys.executable, "-m", "coterie", "run", str(config), "--out", str(out), "--json", *more]


@pytest.mark.parametrize("kind", ["scaffold", "buffered"])
def test_sigkill(kind, experiment, tmp_path):
    """Real processes, killed at random moments (while writing too, if it falls so), resumed until they end."""
    rounds = {**experiment(kind).schedule, "rounds": 60}
    config = tmp_path / "c.toml"
    config.write_text(to_toml(experiment(kind, schedule=rounds)))
    subprocess.run(command(config, tmp_path / "whole"), check=True, capture_output=True)
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())["model_digest"]
    draw, kills = random.Random(5), 0
    while True:
        with subprocess.Popen(
            command(config, tmp_path / "r", "--resume"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            if kills == 0:  # at its start, before or after there is anything
                time.sleep(draw.uniform(0.5, 3))
            else:
                process.stdout.readline()  # a round is done
                time.sleep(draw.uniform(0, 0.25))
            if kills < 3:
                process.send_signal(signal.SIGKILL)
            process.stdout.read()
        if process.returncode == 0:
            break
        kills += 1
    assert kills == 3
    ended = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (ended["status"], ended["model_digest"]) == ("finished", whole)
    assert not list((tmp_path / "r").rglob("*.tmp"))
