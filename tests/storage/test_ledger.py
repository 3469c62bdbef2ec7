"""The ledger: whatever is done to its lines is found, and a crash at any moment is not taken for it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coterie.cli import app
from coterie.core import ConfigError, RunError
from coterie.security import Authority, credentials, public_of, sign
from coterie.storage import Head, Ledger, Tampered, ledger, verify

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
PUBLIC = KEY.public_key().public_bytes_raw()


def written(path, count=5, key=KEY):
    with Ledger(path, key.sign, key.public_key().public_bytes_raw()) as book:
        for i in range(count):
            book.append(
                "reply", run="r", task=i, to="server", digest="ab" * 32, bytes=1000 + i, epsilon=0.1 * i
            )
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return written(tmp_path_factory.mktemp("good") / "ledger.jsonl")


def copy(good, folder):
    for path in (good, ledger._head_path(good)):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / good.name


def test_what_was_written_is_read(good):
    entries = verify(good, PUBLIC)
    assert [each.n for each in entries] == [1, 2, 3, 4, 5]
    assert entries[3].facts == {"run": "r", "task": 3, "to": "server", "digest": "ab" * 32, "bytes": 1003, "epsilon": 0.1 * 3}  # fmt: skip
    for line in good.read_text().splitlines():
        assert json.loads(line)["entry"]["kind"] == "reply"  # each line is JSON


def test_it_goes_on_after_a_restart(tmp_path):
    path = written(written(tmp_path / "deep" / "l.jsonl"), 3)
    assert [each.n for each in verify(path, PUBLIC)] == list(range(1, 9))
    assert verify(written(tmp_path / "empty", 0), PUBLIC) == []


changes = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, 10**6), st.integers(1, 255)),
    st.tuples(st.just("cut end"), st.integers(1, 10**6), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("swap"), st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.just("double"), st.integers(0, 4), st.integers(0, 5)),
    st.tuples(st.just("insert"), st.integers(0, 10**6), st.integers(0, 255)),
    st.tuples(st.just("remove"), st.integers(0, 10**6), st.integers(1, 40)),
    st.tuples(st.just("head byte"), st.integers(0, 10**6), st.integers(1, 255)),
    st.tuples(st.just("head cut"), st.integers(1, 10**6), st.just(0)),
)


def change(path, what, at, more):
    target = ledger._head_path(path) if what.startswith("head") else path
    data = target.read_bytes()
    lines = data.splitlines(keepends=True)
    at_byte = at % len(data)
    if what.endswith("byte"):
        changed = bytearray(data)
        changed[at_byte] ^= more
        data = bytes(changed)
    elif what in ("cut end", "head cut"):
        data = data[: -(at % len(data)) or None] if at % len(data) else b""
    elif what == "drop":
        del lines[at]
    elif what == "swap":
        lines[at], lines[more] = lines[more], lines[at]
    elif what == "double":
        lines.insert(more, lines[at])
    elif what == "insert":
        data = data[:at_byte] + bytes([more]) + data[at_byte:]
    elif what == "remove":
        data = data[:at_byte] + data[at_byte + more :]
    target.write_bytes(b"".join(lines) if what in ("drop", "swap", "double") else data)
    return target


@given(one=changes)
def test_any_change_is_found(good, tmp_path_factory, one):
    path = copy(good, tmp_path_factory.mktemp("changed"))
    before = path.read_bytes() + ledger._head_path(path).read_bytes()
    change(path, *one)
    if path.read_bytes() + ledger._head_path(path).read_bytes() == before:
        assert len(verify(path, PUBLIC)) == 5
        return
    with pytest.raises(Tampered) as error:
        verify(path, PUBLIC)
    assert 0 <= error.value.line <= 6


def test_every_byte_counts(tmp_path):
    """All single-bit edits of a ledger of two lines, one bit of each byte, and all cuts at its end."""
    path = tmp_path / "l"
    with Ledger(path, KEY.sign, PUBLIC) as book:
        book.append("a")
        book.append("b", x=1)
    data = path.read_bytes()
    for i in range(len(data)):
        for wrong in (data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :], data[:i]):
            path.unlink()  # a new file is quicker than one that is written again
            path.write_bytes(wrong)
            with pytest.raises(Tampered):
                verify(path, PUBLIC)


def test_who_has_no_key_cannot_write_it_anew(good, tmp_path):
    path = written(tmp_path / "l", 5, OTHER)
    with pytest.raises(Tampered, match="signed by another key"):
        verify(path, PUBLIC)
    path = copy(good, tmp_path)
    with pytest.raises(Tampered, match="signed by another key"):
        Ledger(path, OTHER.sign, OTHER.public_key().public_bytes_raw())
    ledger._head_path(path).unlink()
    with pytest.raises(Tampered, match="the head"):
        verify(path, PUBLIC)
    with pytest.raises(Tampered, match="the head is missing"):
        Ledger(path, KEY.sign, PUBLIC)
    path.unlink()
    copy(good, tmp_path)
    path.write_bytes(b"")
    with pytest.raises(Tampered, match="head names 5 lines"):
        verify(path, PUBLIC)


def test_a_line_of_another_ledger_of_the_same_key_does_not_fit(good, tmp_path):
    path, other = copy(good, tmp_path), written(tmp_path / "other", 5)
    lines, others = (each.read_bytes().splitlines(keepends=True) for each in (path, other))
    for i in range(4):
        path.write_bytes(b"".join([*lines[:i], others[i], *lines[i + 1 :]]))
        with pytest.raises(Tampered, match="does not follow") as error:
            verify(path, PUBLIC)
        assert error.value.line == max(i + 1, 2)


def test_a_witness_finds_an_older_copy_and_a_rewritten_ledger(good, tmp_path):
    """The two things that the file alone cannot show."""
    entries = verify(good, PUBLIC)
    seen = [Head(each.n, each.digest) for each in entries]
    assert verify(good, PUBLIC, seen) == entries
    older = written(tmp_path / "older", 3)
    assert len(verify(older, PUBLIC)) == 3
    rewritten = written(tmp_path / "rewritten", 5)  # by the owner, at another time
    assert len(verify(rewritten, PUBLIC)) == 5
    for path in (older, rewritten):
        with pytest.raises(Tampered, match="witness"):
            verify(path, PUBLIC, seen[-1:])
    with pytest.raises(Tampered, match="witness"):
        verify(good, PUBLIC, [Head(-1, seen[-1].digest)])


@pytest.mark.parametrize("torn", [1, 30, 200, None])
def test_a_kill_within_an_append_is_repaired_and_nothing_whole_is_lost(tmp_path, torn):
    """Killed while the line is written (after `torn` bytes), or before its head is (None)."""
    path = written(tmp_path / "l", 3)
    head = ledger._head_path(path).read_bytes()
    whole = path.read_bytes()
    line = written(path, 1).read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:torn])
    ledger._head_path(path).write_bytes(head)
    if torn is None:
        assert len(verify(path, PUBLIC)) == 4
    else:
        with pytest.raises(Tampered, match="a crash while writing"):
            verify(path, PUBLIC)
    assert len(verify(written(path, 1), PUBLIC)) == (5 if torn is None else 4)
    assert path.read_bytes().startswith(whole)


def test_a_complete_last_line_that_was_cut_is_no_crash(good, tmp_path):
    path = copy(good, tmp_path)
    for cut in (1, 40, len(path.read_bytes().splitlines(keepends=True)[-1])):
        path.write_bytes(good.read_bytes()[:-cut])
        with pytest.raises(Tampered):
            Ledger(path, KEY.sign, PUBLIC)
        assert path.read_bytes() == good.read_bytes()[:-cut]


def test_torn_bytes_may_be_anything(tmp_path):
    path = written(tmp_path / "l", 3)
    for junk in (b"\0" * 400, b"\r\r{\r", b"\xff"):
        with path.open("ab") as file:
            file.write(junk)
        written(path, 1)
    assert len(verify(path, PUBLIC)) == 6


def test_killed_for_real(tmp_path):
    """SIGKILL while appending; every entry that was reported is there."""
    program = (
        "import sys; from pathlib import Path; from coterie.storage import Ledger\n"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey\n"
        "key = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)\n"
        "book = Ledger(Path(sys.argv[1]), key.sign, key.public_key().public_bytes_raw())\n"
        "while True: print(book.append('reply', pad='x' * 5000).n, flush=True)\n"
    )
    path = tmp_path / "l"
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(20):
            assert writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        reported = 20 + len(writer.stdout.read().splitlines())
    written(path, 1)
    assert len(verify(path, PUBLIC)) in (reported + 1, reported + 2)


def test_several_at_once_and_a_kill_within(tmp_path):
    path = written(tmp_path / "l", 2)
    head = ledger._head_path(path).read_bytes()
    with Ledger(path, KEY.sign, PUBLIC) as book:
        assert [each.n for each in book.extend([("a", {"x": 1}), ("b", {}), ("c", {})])] == [3, 4, 5]
        assert book.extend([]) == []
        with pytest.raises(ValueError, match="JSON"):
            book.extend([("a", {}), ("b", {"x": b""})])
    assert [each.kind for each in verify(path, PUBLIC)[2:]] == ["a", "b", "c"]
    with path.open("r+b") as file:  # the head not yet written, the third line cut short
        file.truncate(path.stat().st_size - 9)
    ledger._head_path(path).write_bytes(head)
    assert [each.kind for each in verify(written(path, 1), PUBLIC)[2:]] == ["a", "b", "reply"]


def test_one_writer(tmp_path):
    path = written(tmp_path / "l", 1)
    with Ledger(path, KEY.sign, PUBLIC), pytest.raises(RunError, match="another process is writing"):
        Ledger(path, KEY.sign, PUBLIC)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing let go of it


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_adds_nothing(tmp_path, monkeypatch, call):
    path = written(tmp_path / "l", 2)
    with Ledger(path, KEY.sign, PUBLIC) as book:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
            with pytest.raises(RunError, match="disk full"):
                book.append("reply")
        assert len(verify(path, PUBLIC)) == 2
        book.append("reply")
    assert len(verify(path, PUBLIC)) == 3


@pytest.mark.parametrize(
    "facts", [{"x": float("nan")}, {"x": b"x"}, {"x": {1: 2, "1": 3}}, {"x": "y" * (2 << 20)}]
)
def test_what_is_no_fact(tmp_path, facts):
    with Ledger(tmp_path / "l", KEY.sign, PUBLIC) as book:
        with pytest.raises(ValueError):  # noqa: PT011
            book.append("reply", **facts)
        book.append("reply")
    assert len(verify(tmp_path / "l", PUBLIC)) == 1


def test_there_is_no_such_ledger(tmp_path):
    with pytest.raises(ConfigError, match="no such ledger"):
        verify(tmp_path / "l", PUBLIC)


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ca = Authority.create(tmp_path / "ca")
    for role, name, hosts in (("site", "a", ()), ("server", "s", ("localhost",))):
        ca.equip(tmp_path / name, role, name, hosts=hosts)

    def book(name):
        key = credentials(tmp_path / name).signing_key
        return Ledger(tmp_path / name / "ledger.jsonl", lambda data: sign(key, data), public_of(key))

    def coterie(*words, code=0):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == code, done.output
        return done.output

    with book("a") as site:
        for i in range(3):
            site.append("reply", run=f"run-{i % 2}", to="s", digest="cd" * 32, bytes=10**i, clipping=1.0, noise=1.1, epsilon=i / 2)  # fmt: skip
        head = site.head
    with book("s") as server:
        server.append("witness", party="a", key=credentials(tmp_path / "a").identity.signing_key.hex(), n=head.n, digest=head.digest)  # fmt: skip
    assert coterie("audit", "verify", "a", "s/ledger.jsonl").count("all as written") == 2
    assert "3 entries" in coterie("audit", "verify", "a", "--witness", "s")
    shown = coterie("audit", "show", "a")
    assert "run-0: 2 entries, 101 bytes, epsilon 1" in shown
    assert "run-1" not in coterie("audit", "show", "a", "--run", "run-0")
    rows = [json.loads(line) for line in coterie("audit", "show", "a", "--json").splitlines()]
    assert rows[1]["bytes"] == 10
    assert rows[-1]["totals"]["run-0"] == {"entries": 2, "bytes": 101, "epsilon": 1.0}
    path = tmp_path / "a" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"bytes":10,', '"bytes":11,'))
    assert "line 2 was changed" in coterie("audit", "verify", "a", code=1)
    assert "line 2 was changed" in coterie("audit", "show", "a", code=1)
    path.unlink()
    ledger._head_path(path).unlink()
    with book("a") as site:  # the owner begins anew
        site.append("reply")
    coterie("audit", "verify", "a")
    assert "a witness has seen" in coterie("audit", "verify", "a", "--witness", "s", code=1)
    assert "--certificate" in coterie(
        "audit", "verify", str(written(tmp_path / "x" / "ledger.jsonl")), code=2
    )
