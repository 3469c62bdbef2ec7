"""Where files come from: the data folders, and verified downloads from a set's public home."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, DataError

CHUNK = 1 << 20
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file can raise
TIMEOUT = 60.0  # seconds without a byte

LARGEST = 1 << 28  # bytes; no file below is longer, and an endless answer must not fill the disk

# name -> (base address, {file: SHA-256})
HOMES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    ),
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/"
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
        {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
}


def default_folders() -> tuple[Path, ...]:
    """Return where data sets are looked for: $COTERIE_DATA, else ./data and ~/.cache/coterie/data."""
    named = [part for part in os.environ.get("COTERIE_DATA", "").split(os.pathsep) if part]
    return tuple(Path(part).expanduser() for part in named or ["data", "~/.cache/coterie/data"])


def find_folder(name: str, places: Sequence[tuple[Path, Sequence[str]]], hint: str) -> Path:
    """Return the first folder that holds all the files named with it (see `find_file`).

    Raises DataError that names every folder and the first file it lacks.
    """
    report = []
    for place, files in places:
        lacking = next((file for file in files if find_file(place, file) is None), None)
        if lacking is None:
            return place
        report.append(f"  {place} ({f'has no {lacking}' if place.is_dir() else 'no such folder'})")
    raise DataError(f"{name}: not found; looked in\n" + "\n".join(report), hint)


def find_file(place: Path, file: str) -> Path | None:
    """Return the file in this folder, or its unpacked form without ".gz", or None."""
    paths = (place / file, place / file.removesuffix(".gz"))
    return next((path for path in paths if path.is_file()), None)


def find_path(path: str | Path, folders: Sequence[Path] | None) -> Path:
    """Return a file named by a user: as it stands, else below one of the data folders.

    Raises DataError that names every place.
    """
    places = [Path(path).expanduser()]
    places += [folder / path for folder in (default_folders() if folders is None else folders)]
    for place in places:
        if place.is_file():
            return place
    looked = "\n".join(f"  {place}" for place in dict.fromkeys(places))
    raise DataError(
        f"{path}: no such file; looked for\n{looked}",
        "give the path from here, from the data folder, or from /",
    )


def open_packed(path: Path) -> BufferedIOBase:
    """Open a file to read its bytes, unpacked if its name ends in ".gz" or ".xz"."""
    if path.suffix == ".gz":
        return gzip.open(path)
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


def read_bytes(path: Path) -> bytes:
    """Read a file as `open_packed` does. Raises DataError with the offset where it breaks."""
    pieces: list[bytes] = []
    try:
        with open_packed(path) as file:
            while piece := file.read1(CHUNK):  # read() would lose what came before a break
                pieces.append(piece)
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read after byte {sum(map(len, pieces))} of its content: {error}",
            "the file is damaged or cut short; get it again",
        ) from error
    return b"".join(pieces)


def download(name: str, folder: Path, *, base: str | None = None, plain_http: bool = False) -> Path:
    """Fetch a data set's files into folder/name and return that folder; files already right are kept.

    Each file goes to a temporary name, is checked against its SHA-256, and only then gets its own
    name, so a half-written file is never seen. base: another address with the same files. Only https is
    used, also after redirects, unless plain_http.
    Raises ConfigError for a set without a public home or a base that is not https, DataError when the
    network, the disk or a checksum fails.
    """
    if name not in HOMES:
        raise ConfigError(f"download({name!r}): no public home is known", f"known: {', '.join(HOMES)}")
    home, files = HOMES[name]
    base = base or home
    schemes = ("https", "http") if plain_http else ("https",)
    if base.partition("://")[0] not in schemes:
        raise ConfigError(f"download: {base} is not https", "use an https address")
    target = folder / name
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file, digest in files.items():
            path = target / file
            if not (path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest):
                _fetch(f"{base.rstrip('/')}/{file}", path, digest, schemes)
    except (OSError, HTTPException) as error:  # URLError is an OSError
        raise DataError(
            f"{name}: download from {base} to {target} failed: {error}",
            f"check the network and the folder, or put the files there yourself: {', '.join(files)}",
        ) from error
    return target


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: Sequence[str]) -> None:
        self.schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if newurl.partition("://")[0] not in self.schemes:
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, path: Path, digest: str, schemes: Sequence[str]) -> None:
    opener = urllib.request.build_opener(_Redirects(schemes))
    seen, received = hashlib.sha256(), 0
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, opener.open(url, timeout=TIMEOUT) as response:
            while received <= LARGEST and (piece := response.read(CHUNK)):
                seen.update(piece)
                received += len(piece)
                file.write(piece)
        if seen.hexdigest() != digest:
            raise DataError(
                f"{url}: {received} bytes with SHA-256 {seen.hexdigest()}, the published file has {digest}",
                "try again; if it stays so, the file at that address is not the published one",
            )
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
