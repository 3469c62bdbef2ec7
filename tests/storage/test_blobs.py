"""Blobs: whole or not there, resumable, named by their bytes."""

import hashlib
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core import ConfigError, RunError, trees
from coterie.storage import Blobs, Corrupt

TREE = {"params": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([1, 2])}, "steps": (3, None, "x")}


def test_a_tree_comes_back_and_is_named_by_its_bytes(tmp_path):
    blobs = Blobs(tmp_path)
    blob = blobs.write(TREE)
    data = blobs.path(blob.digest).read_bytes()
    assert (blob.digest, blob.size) == (hashlib.sha256(data).hexdigest(), len(data))
    found = blobs.read(blob.digest)
    assert found["steps"] == (3, None, "x")
    assert trees.digest(found["params"]) == trees.digest(TREE["params"])
    assert blobs.write(TREE) == blob
    assert list(blobs) == [blob.digest]


@given(cuts=st.lists(st.integers(0, 999), max_size=8), again=st.integers(0, 50))
def test_parts_in_any_lengths_and_repeated_become_the_same_blob(tmp_path_factory, cuts, again):
    data = bytes(i % 251 for i in range(1000))
    digest = hashlib.sha256(data).hexdigest()
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 1000], strict=True):
        first = max(start - again, 0)  # after a break, some of it comes again
        assert blobs.receive(digest, first, data[first:end]) == end
    assert blobs.held(digest) == 1000
    assert digest not in blobs
    Blobs(blobs.folder).finish(digest, 1000)  # as after a crash
    assert blobs.path(digest).read_bytes() == data


def test_wrong_bytes_are_dropped_and_gaps_refused(tmp_path):
    blobs = Blobs(tmp_path)
    digest = hashlib.sha256(b"right").hexdigest()
    blobs.receive(digest, 0, b"wrong")
    with pytest.raises(Corrupt, match="damaged"):
        blobs.finish(digest, 5)
    assert blobs.held(digest) == 0
    with pytest.raises(ValueError, match="from 3 on"):
        blobs.receive(digest, 3, b"ht")
    with pytest.raises(ValueError, match="no SHA-256"):
        blobs.path("../../etc/passwd")


def test_what_is_no_tree_is_named(tmp_path):
    blobs = Blobs(tmp_path)
    data = b"\x08\0\0\0\0\0\0\0{}      rest"
    digest = hashlib.sha256(data).hexdigest()
    blobs.receive(digest, 0, data)
    blobs.finish(digest, len(data))
    with pytest.raises(RunError, match="damaged"):
        blobs.read(digest)


def test_only_what_is_wanted_is_kept(tmp_path):
    blobs = Blobs(tmp_path)
    one, two = blobs.write({"a": torch.zeros(1)}), blobs.write({"a": torch.ones(1)})
    blobs.keep({two.digest})
    assert list(blobs) == [two.digest]
    assert one.digest not in blobs


def test_a_home_elsewhere_lets_another_machine_go_on(tmp_path):
    home = f"file://{tmp_path}/home/run"
    first = Blobs(tmp_path / "first", home)
    blob, other = first.write(TREE), first.write({"x": torch.zeros(3)})
    second = Blobs(tmp_path / "second", home)
    assert blob.digest not in second
    assert trees.digest(second.read(blob.digest)["params"]) == trees.digest(TREE["params"])
    assert blob.digest in second
    second.keep([blob.digest])
    with pytest.raises(RunError, match=f"home/run: .*{other.digest}.* is missing"):
        Blobs(tmp_path / "third", home).read(other.digest)
    second.remove()
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "home" / "run").exists()


def test_other_bytes_at_home_are_refused(tmp_path):
    first = Blobs(tmp_path / "first", f"file://{tmp_path}/home")
    blob = first.write(TREE)
    path = tmp_path / "home" / blob.digest
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    second = Blobs(tmp_path / "second", first.home)
    with pytest.raises(Corrupt, match="arrived damaged"):
        second.read(blob.digest)
    path.unlink()
    first._send(*blob)  # what was cut short is sent again
    path.write_bytes(path.read_bytes()[:9])
    assert first.write(TREE) == blob
    second.read(blob.digest)


def test_a_home_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="nonsense://x"):
        Blobs(tmp_path, "nonsense://x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match=r"file:.*/file/home: .*Error") as caught:
        Blobs(tmp_path / "b", f"file://{tmp_path}/file/home")
    assert caught.value.hint


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_blob_is_adopted_from_another_folder(other_disk, tmp_path, monkeypatch):
    hub, mine = Blobs(tmp_path / "hub"), Blobs(tmp_path / "mine")
    blob = hub.write(TREE)
    if other_disk:

        def link(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        assert mine.adopt(hub.path(blob.digest)) == blob
    hub.keep(())
    assert mine.read(blob.digest)["steps"] == TREE["steps"]


def test_what_killed_writers_left_is_swept(tmp_path):
    blobs = Blobs(tmp_path)
    blob = blobs.write(TREE)
    blobs.receive("0" * 64, 0, b"part")
    for name in ("new-0123456789abcdef", ".new-0123456789abcdef.01234567.tmp"):
        (tmp_path / name).write_bytes(b"half")
    blobs.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {blob.digest, "0" * 64 + ".part"}
