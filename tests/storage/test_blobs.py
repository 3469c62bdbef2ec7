"""Blobs: whole or not there, resumable, named by their bytes."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core import RunError, trees
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
