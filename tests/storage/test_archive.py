"""A run's archive: its blobs here, and at home elsewhere."""

import os

import pytest
import torch

from coterie.core import ConfigError, RunError, trees
from coterie.storage import Blobs, Corrupt
from coterie.storage.archive import Archive

TREE = {"params": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([1, 2])}, "steps": (3, None, "x")}


def test_a_home_elsewhere_lets_another_machine_go_on(tmp_path):
    home = f"file://{tmp_path}/home/run"
    first = Archive(tmp_path / "first", home)
    blob, other = first.write(TREE), first.write({"x": torch.zeros(3)})
    second = Archive(tmp_path / "second", home)
    assert blob.digest not in second.blobs
    assert trees.digest(second.read(blob.digest)["params"]) == trees.digest(TREE["params"])
    assert blob.digest in second.blobs
    second.keep([blob.digest])
    with pytest.raises(RunError, match=f"home/run: .*{other.digest}.* is missing"):
        Archive(tmp_path / "third", home).read(other.digest)
    second.remove()
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "home" / "run").exists()


def test_other_bytes_at_home_are_refused(tmp_path):
    first = Archive(tmp_path / "first", f"file://{tmp_path}/home")
    blob = first.write(TREE)
    path = tmp_path / "home" / blob.digest
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    second = Archive(tmp_path / "second", first.home)
    with pytest.raises(Corrupt, match="arrived damaged"):
        second.read(blob.digest)
    path.unlink()
    first._send(blob)  # what was cut short is sent again
    path.write_bytes(path.read_bytes()[:9])
    assert first.write(TREE) == blob
    second.read(blob.digest)


def test_a_home_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="nonsense://x"):
        Archive(tmp_path, "nonsense://x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match=r"file:.*/file/home: .*Error") as caught:
        Archive(tmp_path / "b", f"file://{tmp_path}/file/home")
    assert caught.value.hint


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_blob_is_adopted_from_another_folder(other_disk, tmp_path, monkeypatch):
    hub, mine = Blobs(tmp_path / "hub"), Archive(tmp_path / "mine")
    blob = hub.write(TREE)
    if other_disk:

        def link(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        assert mine.adopt(hub.path(blob.digest)) == blob
    hub.keep(())
    assert mine.read(blob.digest)["steps"] == TREE["steps"]
    mine.lend(blob.digest, hub)
    mine.keep(())
    assert hub.read(blob.digest)["steps"] == TREE["steps"]
    monkeypatch.undo()
    with pytest.raises(RunError, match="is missing"):
        mine.lend(blob.digest, Blobs(tmp_path / "third"))


def test_what_killed_writers_left_is_swept(tmp_path):
    archive = Archive(tmp_path)
    blob = archive.write(TREE)
    archive.blobs.receive("0" * 64, 0, b"part")
    for name in ("new-0123456789abcdef", ".new-0123456789abcdef.01234567.tmp"):
        (tmp_path / name).write_bytes(b"half")
    Archive(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {blob.digest, "0" * 64 + ".part"}
