"""The server's state, in both databases: what was committed is there, and only the lease's holder writes."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from coterie.core import ConfigError, Fenced, RunError
from coterie.storage.blobs import Blob
from coterie.storage.database import MIGRATIONS, Database, Logged, Run
from coterie.storage.tables import metadata


def digest(n):
    return f"{n:064x}"


def a_run(id="one", created=1.0, **more):
    run = Run(id, "mnist", 'name = "mnist"', digest(1), None, "queued", "", created, "/tmp/r", {"rounds": 5})
    return run._replace(**more)


@pytest.fixture
def database(database_url):
    with closing(Database(database_url)) as database:
        assert database.acquire("here", timeout=0)
        yield database


def test_the_migrations_end_with_the_tables_that_the_code_uses(database):
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        files = (MIGRATIONS / "versions").glob("v*.py")  # each is named by its revision
        assert context.get_current_heads() == (max(path.stem[1:5] for path in files),)


def test_runs_are_kept(database, database_url):
    runs = [a_run("b", 2.0, signer="ann"), a_run("a", 3.0, status="running"), a_run("c", 1.0)]
    for run in runs:
        database.add_run(run)
    database.set_status("a", "failed", "no\nquorum")
    with closing(Database(database_url)) as other:  # reads, without the lease
        assert other.run("a") == runs[1]._replace(status="failed", error="no\nquorum")
        assert other.runs() == [runs[2], runs[0], other.run("a")]
        assert other.runs("queued") == [runs[2], runs[0]]
        with pytest.raises(ConfigError, match="'z': there is no such run"):
            other.run("z")
    database.delete_run("a")
    assert database.runs() == [runs[2], runs[0]]


def test_a_log_is_read_in_order_and_pruned_by_a_commit(database):
    logged = [Logged("reply", n / 3, f'{{"n": {n}}}', Blob(digest(n), 2**40 + n)) for n in range(12)]
    logged.append(Logged("tick", 1e9 + 0.125, "[1]", None))
    for run in ("one", "two"):
        database.add_run(a_run(run))
        for n in range(12):
            database.append_event(run, logged[n])
        database.append_event(run, logged[12])
    assert database.events("one") == logged
    database.commit("one", 1, Blob(digest(99), 5), "{}", {})
    assert (database.events("one"), database.events("two")) == ([], logged)
    database.set_status("two", "finished")
    assert database.events("two") == []


CLIENTS = ("ann", "Ann", "Åsa", "x'; drop table runs")
STEPS = st.lists(
    st.one_of(
        st.dictionaries(st.sampled_from(CLIENTS), st.integers(0, 2**40)),
        st.just("back"),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, keep=st.integers(1, 3))
def test_commits_and_generations_are_those_of_a_list_of_versions(database, steps, keep):
    """The oracle keeps every version whole."""
    database.delete_run("r")
    oracle = [{}]  # version -> client -> generation
    possible = 0  # versions that can be gone back to
    for step in steps:
        if step == "back":
            if possible < 2:
                continue
            oracle.pop()
            possible -= 1
            database.back_to("r", len(oracle) - 1)
        else:
            version = len(oracle)
            oracle.append({**oracle[-1], **step})
            database.commit("r", version, Blob(digest(version), version), f"[{version}]", step, keep=keep)
            possible = min(possible + 1, keep)
        last = len(oracle) - 1
        kept = range(last, last - possible, -1)
        assert database.commits("r") == [(version, Blob(digest(version), version)) for version in kept]
        assert database.rows("r") == [f"[{version}]" for version in range(1, last + 1)]
        for version in kept:
            assert database.generations("r", version) == oracle[version]


def test_many_clients_at_once(database):
    everybody = {f"client-{n}": n for n in range(3000)}
    for version in (1, 2):
        database.commit("r", version, Blob(digest(version), 1), "{}", everybody)
    assert database.generations("r", 2) == everybody


def test_a_commit_that_fails_changes_nothing(database):
    database.append_event("r", Logged("tick", 0.0, "[]"))
    with pytest.raises(Exception, match=r"(?i)null"):
        database.commit("r", 1, Blob(digest(1), 1), None, {"a": 1})
    assert (len(database.events("r")), database.commits("r"), database.generations("r", 1)) == (1, [], {})


def test_nothing_is_written_without_the_lease(database_url):
    with closing(Database(database_url)) as database, pytest.raises(Fenced, match="does not hold the lease"):
        database.add_run(a_run())


def test_a_stale_holder_is_fenced(database_url):
    with closing(Database(database_url)) as old, closing(Database(database_url)) as new:
        assert old.acquire("old", seconds=0.3)
        old.add_run(a_run())
        started = time.monotonic()
        assert new.acquire("new", seconds=60)  # sleeps until the old one's lease has run out
        assert 0.2 < time.monotonic() - started < 5
        calls = [
            old.renew,
            lambda: old.append_event("one", Logged("tick", 0.0, "[]")),
            lambda: old.commit("one", 1, Blob(digest(1), 1), "{}", {}),
            lambda: old.set_status("one", "failed"),
            lambda: old.delete_run("one"),
        ]
        for call in calls:
            with pytest.raises(Fenced, match="another server has taken over"):
                call()
        assert new.runs() == [a_run()]
        new.set_status("one", "running")
        assert not old.acquire("old", timeout=0.05)


def test_a_released_lease_is_taken_at_once_and_a_renewed_one_is_not(database_url):
    with closing(Database(database_url)) as first, closing(Database(database_url)) as second:
        assert first.acquire("first", seconds=0.5)
        first.renew(60)
        assert not second.acquire("second", timeout=0.8)
        threading.Timer(0.3, first.release).start()
        started = time.monotonic()
        assert second.acquire("second", seconds=60)
        assert time.monotonic() - started < 10
        assert second.epoch > 1


HOLDER = """
import sys, time
from coterie.storage.database import Database
database = Database(sys.argv[1])
assert database.acquire("holder", seconds=3600)
with database.write() as connection:  # in the middle of a transaction, too
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_killed_holder_is_followed_at_once(database_url):
    with closing(Database(database_url)) as standby:
        command = [sys.executable, "-c", HOLDER, database_url]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout.readline() == b"held\n"
            threading.Timer(0.5, holder.kill).start()
            started = time.monotonic()
            assert standby.acquire("standby", seconds=60)
            assert time.monotonic() - started < 10  # and not an hour
        standby.add_run(a_run())


def test_a_stopped_process_in_a_transaction_does_not_keep_the_lease_for_ever(database_url):
    if not database_url.startswith("postgresql"):
        pytest.skip("SQLite has one machine, whose stopped process an operator can kill")
    code = HOLDER.replace("import sys, time", "import sys, time\nfrom coterie.storage import database as d\n"
        'd.SESSION = d.SESSION.replace("timeout=10000", "timeout=500")').replace("3600)\nwith", "0.5)\nwith")  # fmt: skip
    command = [sys.executable, "-c", code, database_url]
    with (
        closing(Database(database_url)) as standby,
        subprocess.Popen(command, stdout=subprocess.PIPE) as holder,
    ):
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert standby.acquire("standby", seconds=60)
        assert time.monotonic() - started < 10
        holder.kill()


def test_writes_of_many_threads_are_all_there(database):
    def work(run):
        for n in range(10):
            database.append_event(run, Logged("tick", 0.0, f"{n}"))

    threads = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert [event.head for event in database.events(f"r{i}")] == [f"{n}" for n in range(10)]


def test_runs_of_an_older_server_bring_no_code(database_url):
    with closing(Database(database_url)) as database:
        assert database.acquire("one")
        database.add_run(run := a_run())
        with database._writer() as connection:
            connection.execute(text("alter table runs drop column code"))
            for table in ("certificates", "revocations", "tokens"):
                connection.execute(text(f"drop table {table}"))
            connection.execute(text("update alembic_version set version_num = '0001'"))
    with closing(Database(database_url)) as database:
        assert database.run(run.id) == run
        assert run.code == ""


def test_a_newer_schema_is_refused_by_name(database_url):
    with closing(Database(database_url)) as database, database._writer() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(
        RunError, match="its tables are of version 9999, this Coterie knows 0001, 0002, 0003"
    ) as caught:
        Database(database_url)
    assert "newer Coterie" in caught.value.hint


@pytest.mark.parametrize("url", ["", "server.db", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_what_is_no_database_is_refused(url):
    with pytest.raises(ConfigError, match="database"):
        Database(url)


def test_an_unreachable_server_is_named_without_its_password():
    with pytest.raises(RunError, match=r"postgresql://ann:\*\*\*@127\.0\.0\.1:1/x: ") as caught:
        Database("postgresql://ann:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def filled(tmp_path):
    path = tmp_path / "s.db"
    with closing(Database(f"sqlite:///{path}")) as database:
        database.acquire("here")
        database.add_run(a_run())
        for _ in range(200):
            database.append_event("one", Logged("tick", 0.0, "x" * 500))
    return path


@pytest.mark.parametrize("left", [0, 50, 4096, 0.5, -1])
def test_a_truncated_database_is_one_clear_error(left, tmp_path):
    path = filled(tmp_path)
    size = path.stat().st_size
    os.truncate(path, int(size * left) if isinstance(left, float) else left % (size + 1) - (left < 0))
    with pytest.raises(RunError, match="is damaged") as caught:
        Database(f"sqlite:///{path}")
    assert "copy" in caught.value.hint


def test_another_file_is_no_database(tmp_path):
    (tmp_path / "s.db").write_bytes(b"hello" * 1000)
    with pytest.raises(RunError, match="is damaged"):
        Database(f"sqlite:///{tmp_path}/s.db")


def test_a_full_disk_is_said_and_leaves_all_as_it_was(tmp_path):
    path = filled(tmp_path)
    with closing(Database(f"sqlite:///{path}")) as database:
        database.acquire("here", timeout=5)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            with pytest.raises(RunError, match=r"disk full: sqlite:.*s\.db") as caught:
                database.commit("one", 1, Blob(digest(1), 1), "y" * 300_000, {"a": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "resume" in caught.value.hint
        assert (len(database.events("one")), database.commits("one")) == (200, [])
        database.commit("one", 1, Blob(digest(1), 1), "y" * 300_000, {"a": 1})
        assert database.commits("one") == [(1, Blob(digest(1), 1))]


def test_a_commit_is_flushed_before_it_returns(tmp_path):
    """What SQLite promises about power cuts, as it is set: every commit of a WAL is followed by an fsync."""
    with closing(Database(f"sqlite:///{tmp_path}/s.db")) as database, database.read() as connection:
        assert connection.execute(text("pragma journal_mode")).scalar() == "wal"
        assert connection.execute(text("pragma synchronous")).scalar() == 2  # full
