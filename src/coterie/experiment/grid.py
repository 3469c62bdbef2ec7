"""What a sweep runs: axes of values, and a cell for each combination of them. Pure: no file is written.

An axis is the path of a key in the config; "seed" is an axis like any other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError
from coterie.experiment.config import Config, load, to_dict

Source = Config | Mapping[str, Any] | str | Path
Grid = Mapping[str, Sequence[Any]] | Sequence[str]

EXAMPLE = "for example: --grid algorithm.client.lr=0.05,0.1,0.2"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. values: {axis: its value here}, as the config understood it."""

    name: str  # of its folder: "lr=0.1,seed=7"
    values: Mapping[str, Any]
    config: Config


def cells(
    source: Source, grid: Grid, seeds: int | Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> tuple[Cell, ...]:
    """Every combination of the grid's values and the seeds, seeds innermost, each loaded as a config.

    grid: {path: values}, or texts as on the command line ("algorithm.client.lr=0.05,0.1").
    seeds: how many, counted from the config's seed, or which. overrides: as for `load`, for all cells.
    Raises ConfigError that names the axis or the cell.
    """
    axes = _axes(grid)
    if seeds is not None:
        if "seed" in axes:
            raise ConfigError("seeds are given twice: by --seeds and by --grid seed=...", "leave one out")
        if isinstance(seeds, int):
            if seeds < 1:
                raise ConfigError(f"--seeds {seeds}: must be >= 1", "5 seeds give a usable interval")
            first = _load(source, overrides, [f"{path}={texts[0]}" for path, texts in axes.items()]).seed
            seeds = range(first, first + seeds)
        axes["seed"] = [toml(seed) for seed in seeds]
    if not axes:
        raise ConfigError("nothing to sweep over: no axis is given", f"{EXAMPLE}, or --seeds 5")
    labels = short_names(axes)
    found: dict[str, Cell] = {}
    for texts in product(*axes.values()):
        config = _load(source, overrides, [f"{path}={text}" for path, text in zip(axes, texts, strict=True)])
        plain = to_dict(config)
        values = {path: _look_up(plain, path) for path in axes}
        name = ",".join(f"{labels[path]}={_slug(value)}" for path, value in values.items())
        name = name if len(name) <= 200 else f"{name[:190]}-{_short_hash(name)}"
        if name in found:
            raise ConfigError(f"--grid: {describe(values)} is there twice", "give each value once")
        found[name] = Cell(name, values, config)
    return tuple(found.values())


def base(cell: Cell) -> dict[str, Any]:
    """What all cells of a sweep share: the config without the axes' keys, as JSON has it."""
    config: dict[str, Any] = json.loads(json.dumps(to_dict(cell.config), default=str))
    for path in cell.values:
        above, _, last = path.rpartition(".")
        holder = _look_up(config, above) if above else config
        if isinstance(holder, list):
            holder[int(last)] = None
        elif isinstance(holder, dict):
            holder.pop(last, None)
    return config


def split(text: str) -> list[str]:
    """Cut at the commas that stand in no brackets, braces or quotes. Raises ConfigError if one stays open."""
    pieces, open_brackets, quote, escaped = [""], "", "", False
    for char in text:
        if char == "," and not open_brackets and not quote:
            pieces.append("")
            continue
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and quote == '"' and not escaped
        elif char in "\"'" and (open_brackets or not pieces[-1].strip()):  # else an apostrophe within a word
            quote = char
        elif char in "[{":
            open_brackets += char
        elif char in "]}" and open_brackets:
            open_brackets = open_brackets[:-1]
        pieces[-1] += char
    if open_brackets or quote:
        raise ConfigError(f"{text}: {open_brackets[-1:] or quote} is not closed", "quote it for the shell")
    return [piece.strip() for piece in pieces]


def toml(value: Any) -> str:
    """The value as TOML on one line, as an override takes it. None is "none". Raises ConfigError."""
    value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, str | Path):
        return json.dumps("none" if value is None else str(value), ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    raise ConfigError(f"grid: {value!r} cannot be written into a config", "give numbers, text, tables, lists")


def short_names(paths: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """The shortest end of each path that no other path has: {"algorithm.client.lr": "lr"}."""
    names = {}
    for path in paths:
        parts, others = path.split("."), [f".{other}" for other in paths if other != path]
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        names[path] = next((e for e in ends if not any(o.endswith(f".{e}") for o in others)), path)
    return names


def show_value(value: Any) -> str:
    """A value as a reader wants it: 0.1, true, [16,32], dirichlet(alpha=0.3)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        rest = ",".join(f"{key}={show_value(each)}" for key, each in value.items() if key != "kind")
        return f"{value.get('kind', '')}({rest})"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show_value, value))}]"
    return "none" if value is None else str(value)


def show_axes(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, str]]:
    """{path: {repr of a value: its text}}, tables without the keys that all of an axis share."""
    texts = {}
    for path, values in axes.items():
        tables = [value for value in values if isinstance(value, Mapping)]
        shared = {k for table in tables for k, v in table.items() if all(t.get(k) == v for t in tables)}
        shared = shared - {"kind"} if len(values) > 1 else set()
        texts[path] = {
            repr(value): show_value({k: v for k, v in value.items() if k not in shared}).removesuffix("()")
            if isinstance(value, Mapping)
            else show_value(value)
            for value in values
        }
    return texts


def describe(values: Mapping[str, Any], texts: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Values of axes in one line: "lr = 0.1, seed = 7". texts: of `show_axes`, to use instead."""
    names = short_names(values)
    shown = {p: texts[p][repr(value)] if texts else show_value(value) for p, value in values.items()}
    return ", ".join(f"{names[path]} = {text}" for path, text in shown.items())


def _axes(grid: Grid) -> dict[str, list[str]]:
    """{path: values as texts that `load` takes as overrides}."""
    axes: dict[str, list[str]] = {}
    if isinstance(grid, str):
        raise ConfigError(f"grid = {grid!r}: expected a list of texts or a dict", '["a.b=1,2"]')
    if isinstance(grid, Mapping):
        for path, values in grid.items():
            if isinstance(values, str) or not hasattr(values, "__iter__"):
                raise ConfigError(f"grid: {path} = {values!r}: expected a list of values", f"[{values!r}]")
            axes[path] = [toml(value) for value in values]
    else:
        for text in grid:
            path, equals, values = text.partition("=")
            path = path.strip()
            if not equals or not all(path.split(".")):
                raise ConfigError(f"--grid {text}: expected a.b=1,2,3", EXAMPLE)
            if path in axes:
                raise ConfigError(f"--grid {path} is given twice", "put all its values into one --grid")
            axes[path] = split(values)
    for path, texts in axes.items():
        if not all(texts) or not texts:
            raise ConfigError(f"--grid {path}={','.join(texts)}: a value is missing", EXAMPLE)
    return axes


def _load(source: Source, overrides: Sequence[str], chosen: Sequence[str]) -> Config:
    """The config with the overrides, which speak for themselves, and the chosen values."""
    raw, folder = (to_dict(source), source.folder) if isinstance(source, Config) else (source, None)
    try:
        config = load(raw, [*overrides, *chosen])
    except ConfigError as error:
        message = str(error.args[0])
        for each in chosen:
            message = message.replace(f"--set {each}:", f"--grid {each}:")
        raise ConfigError(message, error.hint) from None
    return config if folder is None else replace(config, folder=folder)


def _look_up(config: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(config, list):
            config = config[int(name)]
        else:
            config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _slug(value: Any) -> str:
    """The value as a part of a folder's name; where letters had to go, a hash keeps it the only one."""
    text = show_value(value)
    slug = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-")
    return text if slug == text and len(text) <= 40 else f"{slug[:40]}-{_short_hash(toml(value))}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
