"""Text by who speaks it, cut into windows for predicting the next character."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError
from coterie.data.sources import read_bytes
from coterie.data.types import Dataset, Examples, Rows

SPEECH = re.compile(r"[^\n]+(?:\n[^\n]+)*")  # lines up to an empty one


def read_speeches(path: Path) -> dict[str, str]:
    """Read a play's text: each role's own lines, in order, joined by newlines; roles as they first speak.

    A speech is a line "ROLE:", then its lines, then an empty one. Roles are told apart by their spelling.
    Raises DataError that names the byte or the line that does not fit.
    """
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text", "get the file again") from error
    lines: dict[str, list[str]] = {}
    for speech in SPEECH.finditer(text):
        head, *spoken = speech[0].split("\n")
        if not head.endswith(":"):
            number = text.count("\n", 0, speech.start()) + 1
            raise DataError(
                f"{path}: line {number}: {head!r} names no role",
                'a speech is a line "ROLE:", its lines, and an empty line; get the file again',
            )
        lines.setdefault(head.removesuffix(":"), []).extend(spoken)
    return {role: "\n".join(spoken) for role, spoken in lines.items() if spoken}


def next_character(
    name: str, texts: Mapping[str, str], *, column: str, length: int, test_fraction: float
) -> Dataset:
    """Learn to continue each text: `length` characters, and for each of them the one that follows.

    x, y: int64 [n, length], places in the sorted characters of all the texts, whose names are the classes.
    A text of c characters gives (c - 1) // length windows, which do not overlap; the last test_fraction of
    them, rounded, are test rows, but never its only one. column: the key that says whose text a row is from.
    Raises ConfigError for a length below 1 or above every text's, or a test_fraction outside [0, 1).
    """
    if length < 1:
        raise ConfigError(f"length={length}: must be >= 1", "80 is usual")
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"test_fraction={test_fraction}: must be at least 0 and below 1")
    longest = max(map(len, texts.values()), default=0)
    if length >= longest:
        raise ConfigError(
            f"length={length}: the longest text has {longest} characters", "use a smaller length, such as 80"
        )
    codes, classes = _encoded(list(texts.values()))
    counts = [max(len(part) - 1, 0) // length for part in codes]
    x, y = (
        np.concatenate(
            [part[at : at + n * length].reshape(n, length) for part, n in zip(codes, counts, strict=True)]
        )
        for at in (0, 1)
    )
    held_out = np.concatenate([_last(n, test_fraction) for n in counts])
    examples = Examples(
        torch.from_numpy(x), torch.from_numpy(y), {column: np.repeat(np.array(list(texts)), counts)}
    )
    train, test = (examples.take(np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    return Dataset(name, train, test if len(test) else None, classes, as_stored)


def as_stored(x: Tensor) -> Tensor:
    """Return x itself: character numbers are what an embedding takes."""
    return x


def _encoded(texts: Sequence[str]) -> tuple[list[Rows], tuple[str, ...]]:
    """Each text as places in its sorted characters, and their names: a newline's is backslash and n."""
    characters, places = np.unique(np.array(list("".join(texts))), return_inverse=True)
    ends = np.cumsum([len(text) for text in texts])
    names = (each if each.isprintable() else repr(each)[1:-1] for each in characters.tolist())
    return np.split(places.astype(np.int64), ends[:-1]), tuple(names)


def _last(n: int, fraction: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.arange(n) >= n - min(int(n * fraction + 0.5), max(n - 1, 0))
