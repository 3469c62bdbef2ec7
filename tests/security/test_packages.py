"""Packages: the same bytes for the same files, and nothing unpacked that could reach out or swell."""

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.core import ConfigError
from coterie.security import Unsafe, members, pack, package, packages, unpack, wheel_name

LINK, DEVICE = stat.S_IFLNK, stat.S_IFCHR


def zipped(*files, kind=None, how=zipfile.ZIP_STORED, end=b""):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive:
        for name, data in files:
            member = zipfile.ZipInfo(name)
            member.compress_type = how
            if kind is not None:
                member.external_attr = (kind | 0o777) << 16
            archive.writestr(member, data)
    return made.getvalue() + end


def test_the_same_tree_gives_the_same_bytes_wherever_and_whenever(tmp_path):
    made = []
    for place, order in (("here", ("b.py", "a/c.py")), ("there", ("a/c.py", "b.py"))):
        for name in order:
            path = tmp_path / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            path.chmod(0o600 if place == "here" else 0o755)
            os.utime(path, (1e9, 1e9 if place == "here" else 1.5e9))
        made.append(package(tmp_path / place))
    (tmp_path / "there" / "__pycache__").mkdir()
    (tmp_path / "there" / "__pycache__" / "b.pyc").write_text("x")
    (tmp_path / "there" / ".secret").write_text("x")
    assert made[0] == made[1] == package(tmp_path / "there")
    (tmp_path / "there" / "b.py").write_text("other")
    assert package(tmp_path / "there") != made[0]


@given(
    st.dictionaries(
        st.from_regex(r"\A[a-z]{1,5}(/[A-Za-z0-9_]{1,8}){0,2}\.py\Z"), st.binary(max_size=200), max_size=8
    )
)
def test_what_is_packed_is_unpacked(tmp_path_factory, contents):
    home = tmp_path_factory.mktemp("packed")
    if len({name.casefold() for name in contents}) < len(contents):
        return
    files = {}
    for n, (name, data) in enumerate(contents.items()):
        files[name] = home / str(n)
        files[name].write_bytes(data)
    unpack(pack(files), home / "out")
    found = {
        p.relative_to(home / "out").as_posix(): p.read_bytes()
        for p in (home / "out").rglob("*")
        if p.is_file()
    }
    assert found == contents


BAD = {
    "../x.py": zipped(("../x.py", "")),
    "a/../../x.py": zipped(("a/../../x.py", "")),
    "/etc/x.py": zipped(("/etc/x.py", "")),
    "C:/x.py": zipped(("C:/x.py", "")),
    "a\\\\..\\\\x": zipped(("a\\..\\x.py", "")),
    "./x.py": zipped(("./x.py", "")),
    "a//x.py": zipped(("a//x.py", "")),
    "is a link": zipped(("x.py", "/etc/passwd"), kind=LINK),
    "link or a device": zipped(("x.py", ""), kind=DEVICE),
    "is in it twice": zipped(("x.py", "a"), ("X.py", "b")),
    "is a file and a folder": zipped(("a", ""), ("a/b.py", "")),
    "bytes when unpacked": zipped(("x.py", bytes(5 << 20)), how=zipfile.ZIP_DEFLATED),
    "compressed in an unusual way": zipped(("x.py", b"x" * 99), how=zipfile.ZIP_BZIP2),
    "members": zipped(*((f"{n}.py", "") for n in range(packages.MEMBERS + 1))),
    "no zip file": b"#!/bin/sh\n",
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("said", BAD)
def test_what_could_reach_out_or_swell_is_refused_before_a_byte_is_written(said, tmp_path):
    with pytest.raises(Unsafe) as caught:
        unpack(BAD[said], tmp_path / "out")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_bomb_whose_sizes_lie_stops_at_what_it_claims(tmp_path):
    data = bytearray(zipped(("x.py", bytes(5 << 20)), how=zipfile.ZIP_DEFLATED))
    for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):  # the sizes in the local and the central header
        place = data.index(mark) + at
        data[place : place + 4] = struct.pack("<L", 100)
    with pytest.raises(Unsafe, match="unpack"):
        unpack(bytes(data), tmp_path / "out")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 100


def test_overlapping_members_count_each(tmp_path):
    """Fifield 2019, "A better zip bomb": many entries of the central directory share one body."""
    data = zipped(("x.py", bytes(1 << 20)), how=zipfile.ZIP_DEFLATED)
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = [data[at:end].replace(b"x.py", f"{n:04}".encode()) for n in range(500)]
    body = data[:at] + b"".join(entries)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 500, 500, len(body) - at, at, 0)
    with pytest.raises(Unsafe, match="bytes when unpacked"):
        unpack(body + tail, tmp_path / "out")


def test_a_list_of_members_is_not_read_when_it_is_too_long():
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 60 << 20, 0, 0)
    with pytest.raises(Unsafe, match="at most 10000"):
        members(bytes(60 << 20) + tail)
    with pytest.raises(Unsafe, match="at most 67108864 may travel"):
        members(bytes(packages.LIMIT + 1))


@given(st.data())
def test_any_damage_is_unsafe_or_harmless(tmp_path_factory, data):
    good = zipped(("a.py", "x = 1\n"), ("b/c.py", "y = 2\n"), how=zipfile.ZIP_DEFLATED)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    home = tmp_path_factory.mktemp("damaged")
    try:
        unpack(bytes(bad), home / "out")
        wheel_name(bytes(bad))
    except Unsafe:
        pass
    assert all(path.resolve().is_relative_to(home) and not path.is_symlink() for path in home.rglob("*"))


def test_a_wheels_name_comes_from_what_is_in_it():
    head = "Wheel-Version: 1.0\nTag: py2-none-any\nTag: py3-none-any\n"
    data = zipped(("nets/__init__.py", ""), ("nets-1.0.dist-info/WHEEL", head))
    assert wheel_name(data) == "nets-1.0-py2.py3-none-any.whl"
    assert wheel_name(zipped(("model.py", ""))) == ""
    with pytest.raises(Unsafe, match="no tag"):
        wheel_name(zipped(("nets-1.0.dist-info/WHEEL", "Tag: ../../x-y-z\n")))


def test_what_is_no_package_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(ConfigError, match="neither a wheel") as caught:
        package(tmp_path / "x.tar.gz")
    assert "unpack it" in caught.value.hint
    with pytest.raises(ConfigError, match="no such file"):
        package(Path("nothing-here"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.py").symlink_to("/etc/passwd")
    with pytest.raises(Unsafe, match="links do not travel"):
        package(tmp_path / "folder")
