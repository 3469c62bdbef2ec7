"""A real Ray cluster of two nodes on this machine, one of which is killed in the middle of a run."""

import logging
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

from coterie.backends import ray_cluster, raycluster
from coterie.core import ConfigError, RunError
from coterie.storage import Memories
from crews import alone, cannot_start, dies_once, make, played, site_of, tasks_of

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, and a way to kill the second."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'coterie[ray]'")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("PYTHONPATH", str(TESTS))  # where actors find crews.py
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        watchful = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": watchful}
        made = Cluster(initialize_head=True, head_node_args=head)
        second = made.add_node(num_cpus=1)
        made.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", made.address)
        made.lose_second = lambda: made.remove_node(second, allow_graceful=False)
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def connected(cluster):
    """The cluster, joined once for several pools."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture(autouse=True)
def _quiet():
    """Ray's own sockets and processes are not ours to close."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", category=pytest.PytestUnraisableExceptionWarning)
        yield


def engaged(site, kind, trap=None):
    """A pool whose two actors have started, one on each node."""
    import ray

    pool = ray_cluster(site, make(kind, trap), address="auto")
    assert pool.staff.count == 2
    ray.wait([member.hand.future for member in pool.members], num_returns=2)
    where = [member.hand.actor.__ray_call__.remote(node_of) for member in pool.members]
    assert len(set(ray.get(where))) == 2
    return pool


def node_of(actor):
    import ray

    return ray.get_runtime_context().get_node_id()


def test_an_actor_that_dies_in_a_round_is_replaced_and_the_bits_stay(cluster, tmp_path, caplog):
    def pool(site):
        made = engaged(site, "scaffold", partial(dies_once, tmp_path))
        (tmp_path / "token-0").touch()
        return made

    with caplog.at_level(logging.WARNING):
        assert played("scaffold", pool) == played("scaffold", alone)
    assert sum("a worker died (ActorDiedError" in line for line in caplog.messages) == 1
    assert not list(tmp_path.iterdir())


def test_errors_name_their_remedy(connected):
    site = site_of("synchronous", Memories())
    with pytest.raises(ConfigError, match=r"backend.cpus = 3.*\nhint: lower backend.cpus"):
        ray_cluster(site, make("synchronous"), address="auto", cpus=3)
    with pytest.raises(ConfigError, match="cannot be sent to the Ray cluster"):
        ray_cluster(site, partial(print, (line for line in ())), address="auto")
    pool = ray_cluster(site, cannot_start, address="auto", actors=1)
    tasks = tasks_of("synchronous")
    with pytest.raises(ConfigError, match="no such data\nhint: look elsewhere"):
        pool.fold(tasks, "stop")
    pool.close()


def test_a_cluster_without_room_ends_the_call_instead_of_waiting(connected, monkeypatch):
    site, tasks = site_of("synchronous", Memories()), tasks_of("synchronous")
    full = engaged(site, "synchronous")
    full.fold(tasks, "stop")
    monkeypatch.setattr(raycluster, "PATIENCE", 2.0)
    late = ray_cluster(site, make("synchronous"), address="auto", actors=1)
    with pytest.raises(RunError, match="started no actor within 2 s"):
        late.fold(tasks, "stop")
    late.close()
    full.close()


def test_a_node_that_is_killed_in_a_round_leaves_the_bits_as_they_are(connected, caplog):
    rounds = []

    def pool(site):
        made = engaged(site, "krum")

        def lose(done):
            rounds.append(done)
            if len(rounds) == 7:
                connected.lose_second()

        made.progress = lose
        return made

    with caplog.at_level(logging.WARNING):
        assert played("krum", pool) == played("krum", alone)
    assert any("a worker died" in line for line in caplog.messages)


def test_no_cluster_and_no_ray_are_one_line_with_the_remedy(monkeypatch):
    site = site_of("synchronous", Memories())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed\nhint: pip install 'coterie\[ray\]'"):
        ray_cluster(site, make("synchronous"))


def test_an_address_where_nothing_runs_says_how_to_start_a_cluster():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'coterie[ray]'")
    script = "from coterie.backends import ray_cluster; ray_cluster(None, None, address='127.0.0.1:1')"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )
    assert "ConfigError: backend.address = '127.0.0.1:1': no Ray cluster can be reached" in done.stderr
    assert "hint: start one with: ray start --head" in done.stderr
