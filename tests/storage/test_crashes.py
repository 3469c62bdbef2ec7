"""Runs that are really killed, and disks that are really full."""

import logging
import math
import os
import resource
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from coterie.core.errors import RunError
from coterie.core.seeds import derive, rng
from coterie.storage import Checkpoints, Memories, RunFolder, load_tree, save_tree, write_atomic

COMMITTER = Path(__file__).with_name("committer.py")
CLIENTS, commits = (runpy.run_path(str(COMMITTER))[name] for name in ("CLIENTS", "commits"))


def expected(rounds):
    """The state, each client's memory and the sums after so many rounds, without files or torch."""
    state, memory, sums = 1.0, {}, []
    for round_ in range(rounds):
        client = CLIENTS[round_ % 3]
        memory[client] = memory[client] * 0.7 + math.sin(state) if client in memory else 0.3
        state = state * 0.9 + memory[client]
        sums.append(4 * state)
    return state, memory, sums


def check(path):
    """Open a killed run as a resume does; return its last round."""
    run = RunFolder.open(path)
    with run.lock():
        assert not list(path.rglob("*.tmp"))
        found = run.checkpoints().latest()
        number, tree, meta = found or (
            -1,
            {"state": torch.ones(4, dtype=torch.float64)},
            {"round": -1},
        )
        run.truncate(number)
        state, memory, sums = expected(number + 1)
        assert meta == {"round": number}
        assert [row["round"] for row in run.rows()] == list(range(number + 1))
        assert [row["sum"] for row in run.rows()] == pytest.approx(sums, rel=1e-12)
        assert tree["state"].tolist() == pytest.approx([state] * 4, rel=1e-12)
        memories = run.memories()
        memories.back_to(number)
        current = memories.at(number)
        assert current.keys() == memory.keys()
        for client, generation in current.items():
            assert generation == max(n for n in range(number + 1) if CLIENTS[n % 3] == client)
            assert memories.get(client, generation).tolist() == pytest.approx([memory[client]] * 4, rel=1e-12)
    return number


def test_a_run_killed_anywhere_goes_on_to_the_same_bits(tmp_path):
    run, copy, whole = tmp_path / "run", tmp_path / "copy", tmp_path / "whole"
    for path in (run, whole):
        RunFolder.create(None, "", out=path).write_config({})
    draw = rng(derive(7, "kills"))
    kills = [f"event {n}" for n in range(1, 81)] + [f"after {draw.uniform(0, 0.04)}" for _ in range(20)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def tell(command):
        process.stdin.write(f"{command}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    reached = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, str(COMMITTER), str(run)], **pipes, text=True, env=one_thread
    ) as process:
        for kill in kills:
            assert tell(kill) == -signal.SIGKILL
            shutil.copytree(run, copy)  # so that the run itself resumes from what the kill left, unaided
            reached.append(check(copy))
            shutil.rmtree(copy)
        assert reached == sorted(reached)
        # the kills did fall into different commits; how many a slow machine gets to is chance
        assert len(set(reached)) > 10
        last = reached[-1] + 5
        assert tell(f"until {last}") == 0
        process.stdin.close()
    commits(whole, last)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ends = [RunFolder.open(path).checkpoints().latest() for path in (run, whole)]
    assert [end[0] for end in ends] == [last, last]
    assert torch.equal(ends[0][1]["state"], ends[1][1]["state"])
    # Of each client only what the two checkpoints refer to is left: two generations for the last one only.
    with closing(sqlite3.connect(run / "memories" / "memories.sqlite3")) as file:
        left = file.execute("select client, generation from generations order by generation").fetchall()
        assert left == [(CLIENTS[n % 3], n) for n in range(last - 3, last + 1)]
        assert file.execute("select count(*) from bodies").fetchone() == (4,)
        assert file.execute("pragma integrity_check").fetchone() == ("ok",)
    assert names(run / "memories") == ["memories.sqlite3"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size):
    """A disk on which no file may grow beyond `size` bytes (EFBIG, for any user)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    for data in (b"x" * 5000, lambda file: file.write(b"x" * 5000)):
        with largest_file(4096), pytest.raises(RunError, match=r"disk full: .*file .* 4096 bytes") as caught:
            write_atomic(path, data)
        assert caught.value.hint
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == ["file"]


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"w": torch.ones(100)}, {})
    with largest_file(4096), pytest.raises(RunError, match="disk full"):
        checkpoints.save(2, {"w": torch.ones(5000)}, {})
    assert checkpoints.latest()[0] == 1
    assert [p.name for p in checkpoints.folder.iterdir()] == ["round-000001.safetensors"]


def test_full_disk_leaves_memories_pending(tmp_path):
    memories = Memories(tmp_path)
    memories.put("a", 1, torch.ones(10))
    memories.commit(1, {"a": 1})
    memories.put("a", 2, torch.ones(50_000))
    with largest_file(100_000), pytest.raises(RunError, match=r"disk full: .*memories\.sqlite3") as caught:
        memories.commit(2, {"a": 2})
    assert caught.value.hint
    assert dict(memories.at(2)) == {"a": 1}
    assert torch.equal(memories.get("a", 2), torch.ones(50_000))
    memories.commit(2, {"a": 2})
    memories.close()
    assert torch.equal(Memories(tmp_path).get("a", 2), torch.ones(50_000))


def test_full_disk_leaves_whole_metrics(tmp_path):
    run = RunFolder(tmp_path)
    run.append({"round": 0})
    with largest_file(20), pytest.raises(RunError, match="disk full"):
        run.append({"round": 1, "text": "x" * 100})
    run.append({"round": 1})
    assert run.rows() == [{"round": 0}, {"round": 1}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_no_space_left_is_called_a_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="disk full"):
        RunFolder(tmp_path).append({"round": 0})


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])
    with pytest.raises(RunError, match="cannot write"):
        write_atomic(tmp_path / "missing" / "file", b"")


def test_any_flipped_or_missing_byte_is_noticed(tmp_path):
    path, tree = tmp_path / "tree", {"w": torch.arange(3.0), "b": (torch.tensor(True), 2**60)}
    save_tree(path, tree, {"round": 3})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(RunError, match=f"{path} is damaged"):
            load_tree(path)
        path.write_bytes(whole[:place])
        with pytest.raises(RunError, match=f"{path} is damaged"):
            load_tree(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(RunError, match="is damaged"):
        load_tree(path)
    path.write_bytes(whole)
    assert load_tree(path)[1] == {"round": 3}


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for number in (1, 2, 3):
        checkpoints.save(number, {"n": number}, {"round": number})
    newest = tmp_path / "round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="coterie"):
        assert checkpoints.latest() == (2, {"n": 2}, {"round": 2})
    assert "round-000003" in caplog.text
    checkpoints.save(3, {"n": -3}, {})
    assert checkpoints.latest()[1] == {"n": -3}


def test_going_back_drops_the_other_future_and_leftovers(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (5, 999_999, 1_000_000):
        checkpoints.save(number, None, {})
    assert checkpoints.latest()[0] == 1_000_000
    (tmp_path / ".round-000006.safetensors.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "round-7.safetensors.bak").write_bytes(b"not ours")
    checkpoints.save(6, None, {})
    assert names(tmp_path) == ["round-000006.safetensors", "round-7.safetensors.bak"]
