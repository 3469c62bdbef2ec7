"""Archives of small images, never unpacked to disk: tar files of JPEGs, and the binary form of CIFAR-10."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coterie.core.errors import DataError
from coterie.data.sources import CHUNK, UNREADABLE, open_packed

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [n, 3, 32, 32], class indices [n]
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE


def read_jpegs(path: Path, classes: Sequence[str]) -> Labelled:
    """Read a tar archive (plain, .gz or .xz) of 32x32 colour JPEGs, each in a folder named by its class.

    Raises DataError that names the member that is broken, of another size, or in another folder.
    """
    index = {name: i for i, name in enumerate(classes)}
    images, labels = [], []
    for member, raw in _members(path):
        label = index.get(PurePosixPath(member).parent.name)
        if label is None:
            raise DataError(f"{path}: member {member!r}: its folder names none of {', '.join(classes)}")
        try:
            with Image.open(BytesIO(raw), formats=["JPEG"]) as image:
                shape = (image.mode, *image.size)
                if shape != ("RGB", SIDE, SIDE):
                    raise DataError(f"{path}: member {member!r}: is {shape}, expected RGB, {SIDE} x {SIDE}")
                images.append(np.asarray(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{path}: member {member!r}: not a readable JPEG: {error}", "get the archive again"
            ) from error
        labels.append(label)
    if not images:
        raise DataError(f"{path}: the archive holds no images", "get the archive again")
    return np.stack(images).transpose(0, 3, 1, 2).copy(), np.array(labels, dtype=np.int64)


def read_cifar_binary(path: Path) -> tuple[Labelled, Labelled]:
    """Read both sets from cifar-10-binary.tar.gz: records of one label byte and 3,072 pixel bytes.

    Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html. Training images come in the order of the
    five batches. Raises DataError that names the member and the byte.
    """
    batches: dict[str, Labelled] = {}
    for member, raw in _members(path):
        name = PurePosixPath(member).name
        if not name.endswith(".bin"):
            continue
        if not raw or len(raw) % RECORD:
            raise DataError(f"{path}: member {member!r}: {len(raw)} bytes are not whole records of {RECORD}")
        records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, RECORD)
        if records[:, 0].max() > 9:
            bad = int(np.flatnonzero(records[:, 0] > 9)[0])
            raise DataError(
                f"{path}: member {member!r}: byte {bad * RECORD}: label {records[bad, 0]}, not 0 to 9"
            )
        batches[name] = records[:, 1:].reshape(-1, 3, SIDE, SIDE).copy(), records[:, 0].astype(np.int64)
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    lacking = [name for name in (*train, "test_batch.bin") if name not in batches]
    if lacking:
        raise DataError(
            f"{path}: the archive has no {', '.join(lacking)}", "get cifar-10-binary.tar.gz again"
        )
    images, labels = zip(*(batches[name] for name in train), strict=True)
    return (np.concatenate(images), np.concatenate(labels)), batches["test_batch.bin"]


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    last = "the start"
    try:
        with open_packed(path) as file:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    if member.isfile():
                        content = archive.extractfile(member)
                        assert content is not None
                        raw = content.read()
                        last = f"member {member.name!r}"
                        yield member.name, raw
            while file.read(CHUNK):  # the checksum is at the very end
                pass
    except (tarfile.TarError, *UNREADABLE) as error:
        raise DataError(
            f"{path}: cannot be read after {last}: {error}", "the archive is damaged; get it again"
        ) from error
