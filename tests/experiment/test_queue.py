"""A server's runs: what is submitted runs, so many at once; what is stopped goes on; statuses are true."""

import json
import resource
import threading
from contextlib import closing
from pathlib import Path

import pytest
import tomli_w

from coterie.core import ConfigError, DataError, Lost
from coterie.experiment import report, run
from coterie.experiment.queue import EXIT_CODES, Queue, Quotas
from coterie.storage import Blobs
from coterie.storage.database import Database
from sites import Sites, hub

TOY = {
    "name": "toy",
    "seed": 5,
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 4}},
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.1, "batch_size": 50}},
    "schedule": {"kind": "synchronous", "rounds": 3, "cohort": 3},
    "backend": {"trainer": "loop"},
    "run": {"evaluate_clients": False},
}


def toml(**more):
    return tomli_w.dumps({**TOY, **more})


@pytest.fixture(autouse=True)
def unreported(monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder: folder)


@pytest.fixture
def database(tmp_path):
    with closing(Database(f"sqlite:///{tmp_path}/server.db")) as database:
        assert database.acquire("here", timeout=5)
        yield database


@pytest.fixture
def queue(database, tmp_path):
    """queue(...) makes one; all are closed at the end."""
    made, updates = [], hub(tmp_path)

    def make(silent=False, carriers=None, **more):
        def connect(run, parts, replay):
            carrier = Sites(parts, tmp_path / "sites" / run.id, replay, silent=silent)
            carrier.hub, carrier.forgets = updates, False  # other runs have the same updates
            if carriers is not None:
                carriers[run.id] = carrier
            return carrier

        made.append(Queue(database, tmp_path / "server", updates, connect, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def result(ended):
    return json.loads((Path(ended.folder) / "result.json").read_text())


def test_a_bad_config_is_refused_before_anything_is_written(queue, database, tmp_path):
    server = queue(quotas=Quotas(rounds=10), data_dir=tmp_path / "empty")
    for text, error, why in [
        ("a = ", ConfigError, "is no TOML"),
        (toml(schedule={"kind": "synchronous", "rounds": 3, "cohort": 9}), ConfigError, "only 4 clients"),
        (toml(data={**TOY["data"], "dataset": "shakespeare"}), DataError, "shakespeare"),
        (toml(schedule={**TOY["schedule"], "rounds": 11}), ConfigError, "this server allows 10"),
        (toml(algorithm={"kind": "fedavg"}), ConfigError, "lr"),
    ]:
        with pytest.raises(error, match=why):
            server.submit(text)
    with pytest.raises(ConfigError, match="this server allows 2"):
        server.submit(toml(), quotas=Quotas(rounds=2))
    assert database.runs() == []
    assert not (tmp_path / "server").exists()


def test_a_run_is_what_it_would_be_alone(queue, tmp_path):
    server, text = queue(), toml()
    id = server.submit(text, signer="ann", quotas=Quotas(seconds=600))
    ended = server.wait(id, 60)
    assert (ended.status, ended.config, ended.signer) == ("finished", text, "ann")
    assert ended.quotas == {"rounds": None, "bytes": None, "seconds": 600}
    assert EXIT_CODES[ended.status] == 0
    assert result(ended)["model_digest"] == run(TOY, out=tmp_path / "whole").model_digest
    assert "coterie" not in {each.name for each in threading.enumerate()}


def test_so_many_at_once_and_the_oldest_first(queue, database):
    carriers = {}
    server = queue(silent=True, carriers=carriers, at_once=2)
    ids = [server.submit(toml(name=f"run-{n}")) for n in range(4)]
    wait_for(lambda: len(carriers) == 2)
    assert [database.run(id).status for id in ids] == ["running", "running", "queued", "queued"]
    server.stop(ids[2])
    server.stop(ids[0])
    assert server.wait(ids[0], 30).status == "stopped"
    wait_for(lambda: ids[3] in carriers)
    assert [database.run(id).status for id in ids] == ["stopped", "running", "stopped", "running"]
    assert ids[2] not in carriers
    server.close()
    assert [database.run(id).status for id in ids] == ["stopped", "interrupted", "stopped", "interrupted"]


def wait_for(what):
    deadline = threading.Event()
    for _ in range(1000):
        if what():
            return
        deadline.wait(0.01)
    raise AssertionError("it did not come")


def test_a_stopped_run_goes_on_to_the_same_bits(queue, database, tmp_path):
    server, id = None, None

    def watch(run, progress):
        if progress.round == 1 and progress.done == 2:
            server.stop(run)

    server = queue(watch=watch)
    id = server.submit(toml())
    ended = server.wait(id, 60)
    assert (ended.status, EXIT_CODES[ended.status]) == ("stopped", 130)
    assert result(ended)["status"] == "interrupted"
    with pytest.raises(ConfigError, match="only what is queued or running"):
        server.stop(id)
    server.watch = lambda run, progress: None
    server.resume(id)
    ended = server.wait(id, 60)
    assert ended.status == "finished"
    assert result(ended)["model_digest"] == run(TOY, out=tmp_path / "whole").model_digest
    with pytest.raises(ConfigError, match="is finished"):
        server.resume(id)


def test_the_next_server_goes_on_with_what_was_left(queue, database, tmp_path):
    first = queue(silent=True, at_once=1)
    ids = [first.submit(toml(name="a")), first.submit(toml(name="b"))]
    first.close()
    assert [database.run(id).status for id in ids] == ["interrupted", "queued"]
    database.set_status(ids[0], "running")  # as a killed one leaves it
    second = queue(at_once=1)
    second.start()
    digests = [result(second.wait(id, 60))["model_digest"] for id in ids]
    assert digests == [run(TOY, out=tmp_path / "whole").model_digest] * 2


def test_quotas_end_a_run_in_words(queue, database):
    size = 4 * (64 * 10 + 10)
    server = queue(quotas=Quotas(bytes=7 * size))
    ended = server.wait(server.submit(toml()), 60)
    assert (ended.status, EXIT_CODES[ended.status]) == ("failed", 1)
    assert f"quota: the run used {12 * size} bytes, and may use {7 * size} bytes" in ended.error
    assert result(ended)["rounds"] == 2
    slow = queue(silent=True, quotas=Quotas(seconds=0.3))
    ended = slow.wait(slow.submit(toml()), 60)
    assert (ended.status, ended.error.splitlines()[0]) == (
        "failed",
        "quota: the run used 0.3 s, and may use 0.3 s",
    )


def test_a_failed_run_says_why_and_does_not_hold_up_the_others(queue):
    bad = toml(name="bad", model={"kind": "softmax"}, algorithm={"kind": "fedavg", "client": {"lr": 1e30}})
    server = queue(at_once=1)
    ids = [server.submit(bad), server.submit(toml())]
    failed, fine = (server.wait(id, 60) for id in ids)
    assert (failed.status, fine.status) == ("failed", "finished")
    assert "client-" in failed.error
    assert result(failed)["error"] == failed.error
    server.resume(ids[0])
    assert server.wait(ids[0], 60).status == "failed"


def test_below_the_quorum_a_run_fails_and_can_go_on_when_sites_are_back(queue, tmp_path, monkeypatch):
    server = queue()
    with monkeypatch.context() as away:
        away.setattr(Sites, "_answer", lambda self, task: Lost(task, "site a: silent for 120 s"))
        id = server.submit(toml())
        ended = server.wait(id, 60)
    assert ended.status == "failed"
    assert "the quorum is 1" in ended.error
    server.resume(id)
    ended = server.wait(id, 60)
    assert ended.status == "finished"
    assert result(ended)["model_digest"] == run(TOY, out=tmp_path / "whole").model_digest


def test_a_full_disk_fails_the_run_which_goes_on_when_there_is_room(queue, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(run, progress):
        if progress.round == 1 and progress.done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    server = queue(watch=watch)
    id = server.submit(toml())
    try:
        ended = server.wait(id, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.status == "failed"
    assert ended.error.startswith("disk full: ")
    server.watch = lambda run, progress: None
    server.resume(id)
    ended = server.wait(id, 60)
    assert ended.status == "finished"
    assert result(ended)["model_digest"] == run(TOY, out=tmp_path / "whole").model_digest


def test_a_bug_fails_the_run_too(queue, database, caplog):
    def watch(run, progress):
        raise ZeroDivisionError("a bug")

    server = queue(watch=watch)
    ended = server.wait(server.submit(toml()), 60)
    assert (ended.status, ended.error) == ("failed", "ZeroDivisionError: a bug")
    assert "Traceback" in caplog.text


def test_delete_leaves_nothing(queue, database, tmp_path):
    server = queue(home=f"file://{tmp_path}/home")
    id = server.submit(toml())
    server.wait(id, 60)
    assert list(Blobs(tmp_path / "server" / "blobs" / id))
    assert list((tmp_path / "home" / id).iterdir())
    server.delete(id)
    silent = queue(silent=True)
    other = silent.submit(toml())
    silent.delete(other)
    assert database.runs() == []
    left = [path for place in ("server", "home") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert left == []
    with pytest.raises(ConfigError, match="no such run"):
        server.delete(id)


def test_a_server_that_is_overtaken_leaves_its_runs_to_the_other(queue, database, tmp_path):
    carriers = {}
    server = queue(silent=True, carriers=carriers)
    id = server.submit(toml())
    wait_for(lambda: id in carriers)
    database.release()
    with closing(Database(f"sqlite:///{tmp_path}/server.db")) as other:
        assert other.acquire("other", timeout=5)
        server.close()  # cannot even say so
        assert other.run(id).status == "running"
        s = tmp_path / "s"
        second = Queue(other, tmp_path / "server", hub(s), lambda run, parts, replay: Sites(parts, s, replay))
        second.start()
        assert second.wait(id, 60).status == "finished"
        second.close()


def test_each_run_has_its_own_log(queue, tmp_path):
    server = queue(at_once=3)
    ids = [server.submit(toml(name=f"n{n}", system={"drop_out": 0.3}, seed=n)) for n in range(3)]
    for id in ids:
        ended = server.wait(id, 60)
        lines = {
            each[24:] for each in (Path(ended.folder) / "run.log").read_text().splitlines()
        }  # or told twice
        rows = [json.loads(line) for line in (Path(ended.folder) / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == sum(row["clients"]["lost"] for row in rows)


PRIVATE = {
    "algorithm": {**TOY["algorithm"], "weighting": "uniform"},
    "transforms": [
        {"kind": "clip", "norm": 1.0},
        {"kind": "noise", "at": "server", "multiplier": 1.0, "delta": 1e-3},
    ],
}


def test_a_private_run_keeps_its_ledger_on_a_server_too(queue):
    """A crash leaves the ledger open and costs a round; a ledger of other noise ends the run."""
    server = queue()

    def watch(run, progress):
        if progress.round == 1 and progress.done == 2:
            server.stop(run)

    def resumed(**change):
        ledger.write_text(json.dumps(json.loads(ledger.read_text()) | change))
        server.resume(id)
        return server.wait(id, 60)

    server.watch = watch
    id = server.submit(toml(**PRIVATE))
    ended = server.wait(id, 60)
    ledger = Path(ended.folder) / "privacy.json"
    assert (ended.status, json.loads(ledger.read_text())["open"]) == ("stopped", False)
    server.watch = lambda run, progress: None
    failed = resumed(multiplier=9.0)
    assert (failed.status, "multiplier = 9.0" in failed.error) == ("failed", True)
    ended = resumed(multiplier=1.0, open=True)
    assert ended.status == "finished"
    assert result(ended)["privacy"]["claims"][0]["rounds"] == TOY["schedule"]["rounds"] + 1


def test_noise_of_sites_is_submitted_with_its_multiplier(queue):
    """They are sent the config as it was signed, which says no more than the budget."""
    clip, _ = PRIVATE["transforms"]
    budget = {"kind": "noise", "at": "client", "budget": {"epsilon": 50.0, "delta": 1e-3}}
    with pytest.raises(ConfigError) as caught:
        queue().submit(toml(**{**PRIVATE, "transforms": [clip, budget]}))
    assert "set multiplier = " in caught.value.hint
