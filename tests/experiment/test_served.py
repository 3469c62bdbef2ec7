"""Law 3 on a server: kill its process anywhere, and the run ends with the same bits, or its log's."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

import coterie as ct
from coterie.core import Cancel, Fenced, Lost, Reply, RunError, Task, drive, fold_task, unfolded
from coterie.experiment import assemble, load, report, run, to_toml
from coterie.experiment.queue import Queue
from coterie.experiment.run import Session
from coterie.experiment.served import Served
from coterie.storage import Blobs, RunFolder
from coterie.storage.archive import Archive
from coterie.storage.database import Database
from sites import Sites, hub

BASE = {
    "name": "served",
    "seed": 3,
    "data": {"dataset": "digits", "partition": {"kind": "dirichlet", "clients": 6, "alpha": 0.5}},
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 40}},
    "schedule": {"kind": "synchronous", "rounds": 3, "cohort": 4},
    "system": {"drop_out": 0.15},
    "backend": {"trainer": "loop"},
}
KINDS = {
    "synchronous": {},
    "scaffold": {"algorithm": {**BASE["algorithm"], "kind": "scaffold"}},
    "hierarchical": {"schedule": {**BASE["schedule"], "kind": "hierarchical", "groups": 2}},
    "stragglers": {
        "schedule": {**BASE["schedule"], "deadline": 2.0, "over_selection": 1.4, "cohort": 3},
    },
    "buffered": {
        "algorithm": {**BASE["algorithm"], "kind": "fedbuff"},
        "schedule": {"kind": "buffered", "rounds": 4, "concurrency": 3, "buffer": 3},
    },
    "asynchronous": {
        "algorithm": {**BASE["algorithm"], "kind": "fedasync"},
        "schedule": {"kind": "asynchronous", "rounds": 10, "concurrency": 3},
    },
}
FROM_THE_LOG = {"stragglers", "buffered", "asynchronous"}  # the order in which sites answer decides


def config(kind, **more):
    return load({**BASE, **KINDS[kind], **more})


@pytest.fixture(autouse=True)
def unreported(monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder: folder)


@pytest.fixture
def database(database_url):
    with closing(Database(database_url)) as database:
        assert database.acquire("here", timeout=5)
        yield database


def connect(folder, **more):
    """The updates' folder, and what connects a run to its sites."""
    sites = folder / "sites"
    return hub(sites), lambda run, parts, replay: Sites(parts, sites, replay, **more)


def serve(queue, toml):
    id = queue.submit(toml)
    ended = queue.wait(id, 60)
    return id, ended


def archive(database):
    """Let the database keep every event that is logged, in the same transaction; the log itself is pruned."""
    with database.write() as connection:
        connection.execute(text("create table archive as select * from events"))
        if database.engine.dialect.name == "sqlite":
            told = "create trigger kept after insert on events begin {}; end"
            rows = "insert into archive select * from events where rowid = new.rowid"
        else:
            told, rows = "create rule kept as on insert to events do also {}", (
                "insert into archive select * from events where run = new.run and seq = "
                "(select max(seq) from events where run = new.run)"
            )  # fmt: skip
        connection.execute(text(told.format(rows)))


def archived(database):
    """The ids of what the plan was told, in order, over all lives of the process; repeats left out."""
    with database.read() as connection:
        heads = connection.execute(text("select head from archive")).scalars().all()
    return list(dict.fromkeys(json.loads(head)["id"] for head in heads))


def replayed(parts, folder, ids):
    """The digest of the model when the sites' answers arrive in this order."""
    algorithm, schedule = parts.algorithm, parts.schedule
    plan = schedule(algorithm, algorithm.init(parts.initial), parts.population.clients)
    plan = unfolded(plan, lambda task: fold_task(task, algorithm.aggregator))
    import asyncio

    state = asyncio.run(drive(plan, Sites(parts, folder, order=ids)))
    return ct.core.trees.digest(state["model"])


def timeless(folder):
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "time")}
        for row in RunFolder(Path(folder)).rows()
    ]


def expected(kind, tmp_path, **more):
    """What the run ends with in-process; None when that depends on who answers first."""
    return None if kind in FROM_THE_LOG else run(config(kind, **more), out=tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_served_run_is_the_same_experiment(kind, database, tmp_path):
    archive(database)
    queue = Queue(database, tmp_path, *connect(tmp_path))
    id, ended = serve(queue, to_toml(config(kind)))
    assert (ended.status, ended.error) == ("finished", "")
    folder = Path(ended.folder)
    told = json.loads((folder / "result.json").read_text())
    whole = expected(kind, tmp_path)
    if whole is None:
        assert told["model_digest"] == replayed(
            assemble(config(kind)), tmp_path / "again", archived(database)
        )
    else:
        assert told["model_digest"] == whole.model_digest
        assert timeless(folder) == timeless(whole.folder)
        ours = {name: value for name, value in told.items() if name not in ("seconds",)}
        assert ours == {name: value for name, value in whole.to_json().items() if name != "seconds"}
        assert (folder / "clients.json").read_bytes() == (whole.folder / "clients.json").read_bytes()
    assert (folder / "model.safetensors").exists()
    assert database.events(id) == []
    queue.close()


@pytest.fixture(scope="module")
def child():
    """child(command, URL, folder, value) -> exit code of a server that is killed."""
    here = Path(__file__)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, str(here.with_name("served_child.py"))]

    def tell(*command):
        process.stdin.write(" ".join(map(str, command)) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    with subprocess.Popen(command, env=env, **pipes) as process:
        yield tell
        process.stdin.close()


@pytest.mark.parametrize("kind", ["synchronous", "scaffold", "buffered", "asynchronous", "stragglers"])
def test_sigkill_anywhere(kind, database_url, child, tmp_path):
    whole, draw = expected(kind, tmp_path), random.Random(7)
    with closing(Database(database_url)) as database:
        database.acquire("test")
        archive(database)
        queue = Queue(database, tmp_path, *connect(tmp_path))
        queue.closing = True  # only submit
        id = queue.submit(to_toml(config(kind)))
        database.release()
        code, kills = None, 0
        while code != 0 and kills < 40:
            how = ("step", draw.randrange(1, 140)) if kills % 4 else ("after", draw.uniform(0, 0.3))
            code = child(how[0], database_url, tmp_path, how[1])
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert child("end", database_url, tmp_path) == 0
        assert kills > 3
        ended = database.run(id)
        assert ended.status == "finished"
        told = json.loads((Path(ended.folder) / "result.json").read_text())
        if whole is None:
            ids = archived(database)
            assert told["model_digest"] == replayed(assemble(config(kind)), tmp_path / "again", ids)
            rounds = range(1, config(kind).schedule["rounds"] + 1)
            assert [row["round"] for row in RunFolder(Path(ended.folder)).rows()] == list(rounds)
        else:
            assert told["model_digest"] == whole.model_digest
            assert timeless(ended.folder) == timeless(whole.folder)
        left = set(Blobs(tmp_path / "blobs" / id)) - {blob.digest for _, blob in database.commits(id)}
        assert len(left) <= 1  # a kill just after the end leaves the empty blob of the clients' evaluation
        assert not [
            *tmp_path.glob("runs/**/*.tmp"),
            *tmp_path.glob("blobs/**/*.tmp"),
            *tmp_path.glob("blobs/**/new-*"),
        ]


def test_every_step_of_a_commit(child, tmp_path):
    """Kill at one step after the other, from copies of a run at its start."""
    short = {"schedule": {**BASE["schedule"], "rounds": 2, "cohort": 2}, "run": {"evaluate_clients": 2}}
    whole = expected("scaffold", tmp_path, **short)
    start, url = tmp_path / "start", f"sqlite:///{tmp_path}/x/server.db"
    with closing(Database(f"sqlite:///{start}/server.db")) as database:
        database.acquire("test")
        queue = Queue(database, tmp_path / "x", *connect(tmp_path / "x"))
        queue.closing = True
        id = queue.submit(to_toml(config("scaffold", **short)))
        database.release()
    for step in range(5, 2000, 11):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(start, tmp_path / "x")
        if child("step", url, tmp_path / "x", step) == 0:
            break
        assert child("end", url, tmp_path / "x") == 0, step
        told = json.loads((tmp_path / "x" / "runs" / id / "result.json").read_text())
        assert (told["status"], told["model_digest"]) == ("finished", whole.model_digest), step
        assert timeless(tmp_path / "x" / "runs" / id) == timeless(whole.folder), step
    assert step > 60


def place(database, tmp_path, parts, **more):
    """A place and a session of the run "one"."""
    folder = RunFolder(tmp_path / "r")
    folder.path.mkdir(exist_ok=True)
    carriers = []

    def carrier(replay):
        carriers.append(Sites(parts, tmp_path / "sites", replay, **more))
        return carriers[-1]

    archive, updates = Archive(tmp_path / "blobs"), hub(tmp_path / "sites")
    served = Served(parts, folder, database, "one", archive, updates, carrier)
    session = Session(parts, folder, served, lambda progress: None, lambda: False)
    return served, session, carriers[0]


def test_an_event_is_durable_before_the_plan_and_the_sites_know(database, tmp_path):
    parts = assemble(config("synchronous"))
    _, session, sites = place(database, tmp_path, parts)
    taken, logged = sites.taken, []

    def check(event):
        logged.append(len(database.events("one")))
        taken(event)

    sites.taken = check
    session.run()
    events = [each for each in sites.told if isinstance(each, Reply | Lost)]
    assert len(events) == len(logged) > 3 * 4
    assert min(logged) == 1
    commits = [each for each in sites.told if isinstance(each, tuple) and not isinstance(each, Lost)]
    assert [version for version, *_ in commits] == [1, 2, 3]


def test_a_server_without_rows_leaves_the_evaluation_to_the_sites(database, tmp_path):
    remote = {
        **BASE,
        "data": {
            "dataset": "sites",
            "name": "scans",
            "sites": ["north", "south"],
            "input_shape": [1, 8, 8],
            "classes": list("0123456789"),
            "partition": {"kind": "natural", "column": "site"},
        },
        "schedule": {"kind": "synchronous", "rounds": 2, "cohort": 2},
    }
    _, session, sites = place(database, tmp_path, assemble(load(remote)), drop=False)
    result = session.run()
    assert (result.status, result.final) == ("finished", {})
    asked = [
        each.task for each in sites.told if isinstance(each, Reply | Lost) and each.task.kind == "evaluate"
    ]
    assert {task.client for task in asked} == {"site=north", "site=south"}
    assert min(task.id for task in asked) > 4  # ids that no task of the plan has had


def test_a_damaged_newest_state_costs_a_round_and_no_bit(database, tmp_path):
    whole = run(config("scaffold"), out=tmp_path / "whole")
    parts = assemble(config("scaffold"))
    served, session, _ = place(database, tmp_path, parts)
    session.run()
    (newest, blob), (older, _) = database.commits("one")
    path = served.archive.blobs.path(blob.digest)
    path.write_bytes(path.read_bytes()[:-9])
    _, session, _ = place(database, tmp_path, parts)
    assert session.version == older == newest - 1
    assert session.run().model_digest == whole.model_digest
    assert timeless(tmp_path / "r") == timeless(whole.folder)
    for _, blob in database.commits("one"):
        served.archive.blobs.path(blob.digest).unlink()
    with pytest.raises(RunError, match=r"the states of versions \[3, 2\] are all lost"):
        place(database, tmp_path, parts)


def test_a_standby_on_another_machine_goes_on(database, tmp_path):
    """It has the database and the blobs' home, and nothing else: no folder, no local blob."""
    pytest.importorskip("fsspec")
    whole = run(config("synchronous"), out=tmp_path / "whole")
    parts, home = assemble(config("synchronous")), f"file://{tmp_path}/home"

    class Power(BaseException):
        pass

    def machine(name, after=10**9):
        folder = RunFolder(tmp_path / name / "r")
        folder.path.mkdir(parents=True)
        archive, updates = Archive(tmp_path / name / "blobs", home), hub(tmp_path / name)

        def carrier(replay):
            sites = Sites(parts, tmp_path / "sites", replay)
            sites.hub = updates
            return sites

        served = Served(parts, folder, database, "one", archive, updates, carrier)
        calls = iter(range(after))

        def watch(progress):
            if next(calls, None) is None and progress.done:
                raise Power  # in the middle of a round

        return Session(parts, folder, served, watch, lambda: False)

    with pytest.raises(Power):
        machine("first", after=11).run()
    assert database.events("one")
    shutil.rmtree(tmp_path / "first")
    second = machine("second")
    assert 0 < second.version < 3
    assert second.run().model_digest == whole.model_digest
    assert timeless(tmp_path / "second" / "r") == timeless(whole.folder)


def test_a_fenced_server_writes_nothing_more(database, database_url, tmp_path):
    parts = assemble(config("synchronous"))
    _, session, sites = place(database, tmp_path, parts)
    taken, count = sites.taken, []
    other = Database(database_url)

    def overtaken(event):
        taken(event)
        count.append(event)
        if len(count) == 6:
            database.release()
            assert other.acquire("other", timeout=5)
            database.epoch = 1  # it does not know yet

    sites.taken = overtaken
    with pytest.raises(Fenced):
        session.run()
    assert not (tmp_path / "r" / "result.json").exists()
    assert len(count) == 6
    other.close()


def test_unfolding_leaves_no_fold_and_cancels_the_late(tmp_path):
    parts = assemble(config("stragglers"))
    plan = parts.schedule(parts.algorithm, parts.algorithm.init(parts.initial), parts.population.clients)
    plan = unfolded(plan, lambda task: fold_task(task, parts.algorithm.aggregator))
    sites = Sites(parts, tmp_path, drop=False)
    seen = []
    send = sites.send
    sites.send = lambda actions: (seen.extend(actions), send(actions))
    import asyncio

    asyncio.run(drive(plan, sites))
    assert {action.kind for action in seen if isinstance(action, Task)} == {"train"}
    assert any(isinstance(action, Cancel) for action in seen)
    assert not sites.tasks
    assert not sites.timers
