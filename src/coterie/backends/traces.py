"""Traces of real devices, from CSV files: how fast each is, and when it is online.

The first line names the columns; further columns are ignored. `system.dealt` says who gets which device.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from coterie.core.errors import ConfigError
from coterie.core.types import ClientId


class Stretches(NamedTuple):
    """When a device is online: sorted stretches that do not touch, within one period."""

    starts: Sequence[float]  # seconds
    ends: Sequence[float]  # seconds, not included

    def stays(self, now: float, need: float, period: float) -> float:
        """How long it stays online from `now` in [0, period) on; 0 where it is offline. May say `need`."""
        index = bisect_right(self.starts, now) - 1
        if index < 0 or now >= self.ends[index]:
            return 0.0
        left = self.ends[index] - now
        if self.ends[index] < period or self.starts[0] > 0:
            return left
        # It is online at the period's end and at its start, so the first stretch goes on from the last.
        return need if len(self.starts) == 1 else left + self.ends[0]


def devices(file: Path, columns: Sequence[str], folder: Path = Path()) -> dict[ClientId, tuple[float, ...]]:
    """The named columns of each device, all > 0. Raises ConfigError with the file and the line."""
    found: dict[ClientId, tuple[float, ...]] = {}
    for where, client, texts in _rows(file, columns, folder):
        if client in found:
            raise ConfigError(f"{where}: client {client!r} is listed twice", "give each device one line")
        numbers = tuple(_number(where, *pair) for pair in zip(columns, texts, strict=True))
        for name, value in zip(columns, numbers, strict=True):
            if value <= 0:
                raise ConfigError(f"{where}: {name} = {value:g}: must be > 0")
        found[client] = numbers
    return found


def stretches(
    file: Path, period: float | None = None, folder: Path = Path()
) -> tuple[dict[ClientId, Stretches], float]:
    """When each device is online, and the seconds after which it all begins again (None: the last end).

    Raises ConfigError with the file and the line.
    """
    found: dict[ClientId, list[tuple[float, float]]] = {}
    last = 0.0
    for where, client, texts in _rows(file, ("start", "end"), folder):
        start, end = _number(where, "start", texts[0]), _number(where, "end", texts[1])
        if not 0 <= start < end:
            raise ConfigError(
                f"{where}: start = {start:g}, end = {end:g}: must be 0 <= start < end",
                "write a stretch over the period's end as two",
            )
        if period is not None and end > period:
            raise ConfigError(f"{where}: end = {end:g} is after the period of {period:g} s")
        found.setdefault(client, []).append((start, end))
        last = max(last, end)
    return {client: _joined(sorted(pairs)) for client, pairs in found.items()}, period or last


def _joined(pairs: Sequence[tuple[float, float]]) -> Stretches:
    starts: list[float] = []
    ends: list[float] = []
    for start, end in pairs:
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return Stretches(starts, ends)


def _rows(file: Path, columns: Sequence[str], folder: Path) -> Iterator[tuple[str, ClientId, list[str]]]:
    """Yield ("FILE, line 7", client, texts of the columns) for every line below the head."""
    path = next((place for place in (folder / file, Path(file)) if place.exists()), folder / file)
    wanted = ("client", *columns)
    line, lines, empty = 0, None, True
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            lines = csv.reader(opened, strict=True)
            head = [name.strip() for name in next(lines, [])]
            for name in wanted:
                if head.count(name) != 1:
                    raise ConfigError(
                        f"{path}, line 1: must name the column {name!r} once",
                        f"the first line names the columns: {','.join(wanted)}",
                    )
            places = [head.index(name) for name in wanted]
            for cells in lines:
                line = lines.line_num
                if not cells:
                    continue
                if len(cells) != len(head):
                    raise ConfigError(f"{path}, line {line}: {len(cells)} cells under {len(head)} columns")
                client, *texts = (cells[place].strip() for place in places)
                empty = False
                yield f"{path}, line {line}", client, texts
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file", "the path starts at the folder of the config"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8", "save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{path}, line {lines.line_num if lines else 1}: {error}") from None
    if empty:
        raise ConfigError(f"{path}: holds no devices", f"write a line for each: {','.join(wanted)}")


def _number(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {name} = {text!r}: expected a number")
    return value
