"""Worker processes: real ones, killed for real."""

import logging
import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from coterie.backends import workers
from coterie.core import ConfigError, RunError
from coterie.storage import Memories
from crews import (
    alone,
    answered,
    blobs,
    cannot_start,
    dies_on,
    dies_once,
    ends_at_once,
    make,
    make_sharing,
    played,
    refuses,
    site_of,
    tasks_of,
    told,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")


def hired(kind, count, trap=None):
    """site -> the pool of `count` processes."""
    return lambda site: workers(site, make(kind, trap), count)


def pids(pool):
    return [member.hand.process.pid for member in pool.members]


def ended(pids, within=30.0):
    """Wait until these processes have ended."""
    poll = select.poll()
    handles = []
    for pid in pids:
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
        poll.register(handles[-1], select.POLLIN)
    for handle in list(handles):
        if not poll.poll(within * 1000):
            return False
        poll.unregister(handle)
        os.close(handle)
    return True


@pytest.fixture(scope="module")
def pool():
    made = hired("scaffold", 2)(site_of("scaffold", Memories()))
    yield made
    made.close()


def one_process(tasks):
    return told("scaffold", site_of("scaffold", Memories()).fold(tasks, "stop"))


def test_a_fold_and_answers_have_the_bits_of_one_process(pool):
    tasks = tasks_of("scaffold")
    assert told("scaffold", pool.fold(tasks, "stop")) == one_process(tasks)
    assert answered(pool.answer(tasks)) == answered(site_of("scaffold", Memories()).answer(tasks))


def test_nothing_piles_up_from_call_to_call(pool):
    tasks = tasks_of("scaffold")
    pool.fold(tasks, "stop")
    before = pids(pool), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        pool.fold(tasks, "stop")
    assert (pids(pool), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_ctrl_c_is_the_drivers_alone(pool):
    tasks = tasks_of("scaffold")
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert told("scaffold", pool.fold(tasks, "stop")) == one_process(tasks)
    assert pids(pool) == before


def test_an_idle_worker_that_was_killed_is_replaced(pool, caplog):
    tasks = tasks_of("scaffold")
    pool.fold(tasks, "stop")
    gone = pids(pool)[0]
    os.kill(gone, signal.SIGKILL)
    assert ended([gone])
    with caplog.at_level(logging.WARNING):
        assert told("scaffold", pool.fold(tasks, "stop")) == one_process(tasks)
    assert ["a worker died (killed by SIGKILL)" in line for line in caplog.messages] == [True]
    assert gone not in pids(pool)


def test_a_run_ends_with_the_bits_of_one_process():
    assert played("batchnorm", hired("batchnorm", 2)) == played("batchnorm", alone)


def test_sigkill_in_the_middle_of_a_round_changes_nothing(tmp_path, caplog):
    for token in range(2):
        (tmp_path / f"token-{token}").touch()
    with caplog.at_level(logging.WARNING):
        ends = played("scaffold", hired("scaffold", 2, partial(dies_once, tmp_path)))
    assert ends == played("scaffold", alone)
    assert sum("a worker died (killed by SIGKILL)" in line for line in caplog.messages) == 2
    assert not list(tmp_path.iterdir())


def test_a_client_that_kills_its_workers_is_lost_and_errors_are_raised_here():
    tasks = tasks_of("synchronous")
    guilty, wrong = tasks[3].client, tasks[5].client
    pool = hired("synchronous", 1, partial(both, guilty, wrong))(site_of("synchronous", Memories()))
    try:
        got = pool.fold([task for task in tasks if task.client != wrong], "stop")
        assert got.fold.lost == (f"{guilty}: its worker died 3 times",)
        assert len(got.accepted) == len(tasks) - 2
        with pytest.raises(ConfigError, match="is wrong\nhint: leave it out"):
            pool.fold([task for task in tasks if task.client != guilty], "stop")
    finally:
        pool.close()


def both(guilty, wrong, task):
    dies_on(guilty, task)
    refuses(wrong, task)


@pytest.mark.parametrize(
    ("start", "error", "says"),
    [
        (cannot_start, ConfigError, "no such data\nhint: look elsewhere"),
        (ends_at_once, RunError, "no worker is left: new ones end while they start: exit code 3"),
    ],
)
def test_a_worker_that_cannot_start_says_why(start, error, says):
    pool = workers(site_of("synchronous", Memories()), start, 1)
    try:
        with pytest.raises(error, match=says):
            pool.fold(tasks_of("synchronous"), "stop")
    finally:
        pool.close()


def test_the_data_set_is_shared_and_not_copied():
    pool = workers(site_of("synchronous", Memories()), partial(make_sharing, blobs()), 1)
    try:
        assert pool.fold(tasks_of("synchronous"), "stop").fold.replies == 9
    finally:
        pool.close()


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ConfigError, match=r"cannot be sent to another process.*\nhint: define models"):
        workers(site_of("synchronous", Memories()), lambda store: None, 1)
    with pytest.raises(ConfigError, match=r"backend.workers = 0"):
        workers(site_of("synchronous", Memories()), site_of, 0)


DRIVER = """
import os, signal, sys
from crews import make, site_of, tasks_of
from coterie.backends import workers
from coterie.storage import Memories

def naps(task):
    print(os.getpid(), flush=True)
    signal.pause()

if __name__ == "__main__":
    pool = workers(site_of("synchronous", Memories()), make("synchronous", naps), 2)
    if sys.argv[1] == "work":
        pool.fold(tasks_of("synchronous"), "stop")
    print(*(member.hand.process.pid for member in pool.members), flush=True)  # and ends without close()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for the end of processes by pidfd")
@pytest.mark.parametrize("how", ["work", "leave"])
def test_no_worker_outlives_its_driver(how, tmp_path):
    """Killed while its workers train, or gone without a word."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, script, how], stdout=subprocess.PIPE, text=True, env=env
    ) as driver:
        if how == "work":
            seen = [int(driver.stdout.readline()) for _ in range(2)]
            driver.kill()
        else:
            seen = [int(pid) for pid in driver.stdout.readline().split()]
        assert ended(seen)
        driver.wait(30)


def test_closing_ends_every_worker():
    pool = hired("synchronous", 2)(site_of("synchronous", Memories()))
    mine = pids(pool)
    pool.close()
    for pid in mine:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    pool.close()
