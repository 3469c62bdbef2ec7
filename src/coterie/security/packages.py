"""Code that travels: one zip file, a wheel or plain files; packed the same by everyone, unpacked with care.

Whoever unpacks believes nothing that the file says of itself: every member is looked at, and refused for
what it is, before a byte is written. Nothing here runs code.
"""

from __future__ import annotations

import io
import itertools
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from coterie.errors import ConfigError

LIMIT = 64 << 20  # bytes of a package
UNPACKED = 512 << 20  # bytes of what is in it
RATIO = 100  # how many times larger than the package that may be
MEMBERS = 10_000
_DIRECTORY = 512 * MEMBERS  # bytes of the zip's list of members
_END = struct.Struct("<4s4H2LH")  # what a zip file ends with
_KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_WHEEL = re.compile(r"([A-Za-z0-9_.]+-[A-Za-z0-9_.!+]+)\.dist-info/WHEEL")


class Unsafe(ConfigError):
    """A package that is not unpacked, and why."""


def pack(files: Mapping[str, Path]) -> bytes:
    """The same bytes for the same names and contents, whoever packs them where and when.

    Sorted, without times, owners or compression (whose bytes depend on the library).
    """
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in sorted(files):
            member = zipfile.ZipInfo(name)  # of 1980
            member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(member, files[name].read_bytes())
    return made.getvalue()


def package(path: Path) -> bytes:
    """What travels for a path: a wheel or zip file as it is, a folder packed. Raises ConfigError.

    Of a folder travels every file but hidden ones and what Python compiled.
    """
    if path.is_dir():
        found = {each.relative_to(path).as_posix(): each for each in path.rglob("*")}
        shown = {
            name: each
            for name, each in found.items()
            if not re.search(r"(^|/)(\.|__pycache__(/|$))|\.pyc$", name)
        }
        if links := [name for name, each in shown.items() if each.is_symlink()]:
            raise Unsafe(
                f"{path / links[0]}: is a link, and links do not travel", "put the file itself there"
            )
        data = pack({name: each for name, each in shown.items() if each.is_file()})
    elif path.suffix in (".whl", ".zip"):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
    else:
        raise ConfigError(
            f"{path}: {'neither a wheel, a .zip nor a folder' if path.exists() else 'there is no such file'}",
            "code travels as a wheel, a .zip or a folder; build a source distribution, or unpack it, first",
        )
    try:
        members(data)
    except Unsafe as error:
        raise Unsafe(f"{path}: {error.args[0]}", error.hint) from None
    return data


def members(data: bytes) -> list[zipfile.ZipInfo]:
    """The files in a package. Raises Unsafe, naming the rule, when it may not be unpacked."""
    if reason := next(_outside(data), ""):
        raise Unsafe(f"package: {reason}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise Unsafe(f"package: no zip file ({error})") from None
    if reason := next(_inside(found, len(data)), ""):
        raise Unsafe(f"package: {reason}")
    return [each for each in found if not each.is_dir()]


def unpack(data: bytes, folder: Path) -> None:
    """Write the files of a package into a new folder. Raises Unsafe, then nothing was written, or OSError."""
    listed = members(data)
    folder.mkdir(mode=0o700)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for each in listed:
                place = folder / each.filename
                place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with archive.open(each) as source, place.open("xb") as file:
                    left = each.file_size + 1  # what it says, and not a byte more
                    while left > 0 and (piece := source.read(min(left, 1 << 20))):
                        left -= len(piece)
                        file.write(piece)
                if left != 1:
                    raise Unsafe(f"package: {each.filename!r} is not of the size that it claims")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise Unsafe(f"package: it does not unpack ({error})") from None


def wheel_name(data: bytes) -> str:
    """The file name that a wheel must have to be installed; "" when the package is none. Raises Unsafe."""
    heads = [each for each in members(data) if _WHEEL.fullmatch(each.filename)]
    if not heads:
        return ""
    if len(heads) > 1 or heads[0].file_size > 1 << 16:
        raise Unsafe("package: a wheel has one WHEEL file, of at most 64 KiB")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        text = archive.read(heads[0]).decode("utf-8", "replace")
    tags = [
        tag.split("-")
        for tag in re.findall(r"^Tag: ([A-Za-z0-9_]+-[A-Za-z0-9_]+-[A-Za-z0-9_]+)\s*$", text, re.M)
    ]
    if not tags:
        raise Unsafe("package: its WHEEL file names no tag")
    python, abi, platform = (".".join(dict.fromkeys(part)) for part in zip(*tags, strict=True))
    return f"{heads[0].filename.partition('.dist-info/')[0]}-{python}-{abi}-{platform}.whl"


def _outside(data: bytes) -> Iterator[str]:
    """What is wrong with the file as a whole: seen before a library builds a list of what is in it."""
    if len(data) > LIMIT:
        yield f"{len(data)} bytes; at most {LIMIT} may travel"
    at = data.rfind(b"PK\5\6", max(0, len(data) - _END.size - (1 << 16)))
    if at < 0 or len(data) < at + _END.size:
        yield "no zip file"
        return
    *_, count, listed, _, _ = _END.unpack_from(data, at)
    if count > MEMBERS or listed > _DIRECTORY or data[max(0, at - 20) :].startswith(b"PK\6\7"):
        yield f"it says that it has {count} members; at most {MEMBERS} may be in it"


def _inside(found: list[zipfile.ZipInfo], size: int) -> Iterator[str]:
    if len(found) > MEMBERS:
        yield f"{len(found)} members; at most {MEMBERS} may be in it"
    total = sum(each.file_size for each in found)
    if total > min(UNPACKED, RATIO * size):
        yield f"{total} bytes when unpacked; at most {min(UNPACKED, RATIO * size)} may come of {size}"
    files: set[str] = set()
    folders: set[str] = set()
    for each in found:
        name, kind = each.filename, stat.S_IFMT(each.external_attr >> 16)
        parts = name.removesuffix("/").split("/")
        bad = any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
        if bad or name != each.orig_filename or re.search(r"[\\:\x00-\x1f\x7f]", name) or len(name) > 1000:
            yield f"{name[:100]!r} is no name that may be unpacked"
        if kind not in (0, stat.S_IFDIR if each.is_dir() else stat.S_IFREG):
            yield f"{name[:100]!r} is a link or a device"
        if each.flag_bits & 1 or each.compress_type not in _KNOWN:
            yield f"{name[:100]!r} is encrypted, or compressed in an unusual way"
        folded = "/".join(parts).casefold()
        if not each.is_dir():
            if folded in files:
                yield f"{name[:100]!r} is in it twice"
            files.add(folded)
        above = itertools.islice(PurePosixPath(folded).parents, len(parts) - 1)
        folders |= {str(parent) for parent in above} | ({folded} if each.is_dir() else set())
    for name in files & folders:
        yield f"{name[:100]!r} is a file and a folder"
