"""The config of an experiment: read TOML or a dict, override, check what can be checked without the parts.

What a `kind` takes is checked where it is built (`parts`); which parts go together, in `run`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tomli_w

from coterie.core.errors import ConfigError
from coterie.data.sources import default_folders
from coterie.experiment import parts
from coterie.experiment.parts import nearest

__all__ = ["Config", "data_folders", "load", "nearest", "to_dict", "to_toml"]

Section = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """One experiment; the attributes are the sections of the TOML file, as plain values.

    data: dataset, partition (a table), holdout (the part of each client's examples kept for its own test,
    0.1), and what the data set's loader takes. run: see `run_settings`; every key is there.
    folder: where the file lies; "model.py:Net" and other relative paths start there.
    """

    name: str
    data: Section
    model: Section
    algorithm: Section
    schedule: Section
    seed: int = 0
    compare: list[Literal["centralised", "local_only"]] = field(default_factory=list)
    transforms: list[Section] = field(default_factory=list)
    backend: Section = field(default_factory=dict)
    system: Section = field(default_factory=dict)
    run: Section = field(default_factory=dict)
    folder: Path = field(default=Path(), compare=False)

    def __post_init__(self) -> None:
        """Fill in and check the sections."""
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ConfigError(
                f"name = {self.name!r}: a folder's name: letters, digits, '-', '_' and '.' only",
                "for example: mnist-dirichlet",
            )
        for section, check in (
            ("data", data_settings),
            ("backend", backend_settings),
            ("run", run_settings),
        ):
            object.__setattr__(
                self, section, parts.call(check, getattr(self, section), section, label=f"[{section}]")
            )
        _kinds(self.data["partition"], "data.partition")
        for section in ("model", "algorithm", "schedule"):
            _kinds(getattr(self, section), section)
        for index, transform in enumerate(self.transforms):
            _kinds(transform, f"transforms[{index}]")
        for half in ("client", "server"):
            parts.convert(self.algorithm.get(half, {}), Section, f"algorithm.{half}")


def data_settings(*, dataset: str, partition: Section, holdout: float = 0.1, **loader: Any) -> Section:
    """What `[data]` takes; other keys go to the data set's loader."""
    if not 0 <= holdout < 1:
        raise ConfigError(
            f"data.holdout = {holdout}: must be >= 0 and < 1", "0.1 keeps a tenth for each client's test"
        )
    return {"dataset": dataset, "partition": partition, "holdout": holdout, **loader}


def backend_settings(
    *,
    kind: Literal["inprocess", "ray"] = "inprocess",
    trainer: str | Section = "auto",
    workers: int = 1,
    threads: int = 1,
    block: Literal["auto"] | int = "auto",
    compile: bool = False,
    precision: Literal["float32", "bfloat16"] = "float32",
    address: str | None = None,
    actors: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Section:
    """What `[backend]` takes: where clients train, and how.

    workers: processes of this machine. threads: of each process, in which clients train side by side where
    their training is a program, to the same bits. address, actors, cpus, gpus: of a Ray cluster; actors are
    as many as it has CPUs for, and cpus and gpus what each takes. block: clients that the vectorised trainer
    takes together. compile: let torch.compile fuse its graphs (up to a minute at the start). precision: the
    type it multiplies in.
    """
    settings = dict(locals())
    for name in ("address", "actors", "cpus", "gpus"):
        if kind != "ray" and settings[name] not in (None, 0.0, 1.0):
            raise ConfigError(f"backend.{name}: only a Ray cluster has it", 'set backend.kind = "ray"')
    if kind == "ray" and workers > 1:
        raise ConfigError("backend.workers: a Ray cluster has actors", "set backend.actors instead")
    for name in ("workers", "threads"):
        if settings[name] < 1:
            raise ConfigError(f"backend.{name} = {settings[name]}: must be >= 1")
    if block != "auto" and block < 2:
        raise ConfigError(f"backend.block = {block}: must be >= 2", '"auto" chooses by the model\'s size')
    return {name: value for name, value in settings.items() if value is not None}


def run_settings(
    *,
    evaluate_every: int = 1,
    evaluate_clients: bool | int = 1000,
    checkpoint_every: int = 1,
    keep_checkpoints: int = 2,
    tensorboard: bool = False,
    on_nan: Literal["stop", "drop"] = "stop",
    threads: int = 1,
) -> Section:
    """What `[run]` takes: how often to evaluate and to save (in rounds), and on what to compute.

    evaluate_clients: each client's own test at the end: of all (true), of none, or of at most so many.
    on_nan: stop the run, or drop the update.
    """
    settings = dict(locals())
    for name in ("evaluate_every", "checkpoint_every", "keep_checkpoints", "threads"):
        if settings[name] < 1:
            raise ConfigError(f"run.{name} = {settings[name]}: must be >= 1")
    return settings


def load(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a config from a TOML file, or take it from a mapping with the same names.

    overrides: "schedule.rounds=5", "transforms.0.norm=2": a path and a TOML value, or else plain text.
    Raises ConfigError that names the file, line and column or the key.
    """
    if isinstance(source, Mapping):
        raw, folder = parts.plain(source, ""), Path()
    else:
        raw, folder = _read(Path(source)), Path(source).parent
    for override in overrides:
        _set(raw, override)
    return Config(**parts.arguments(Config, raw, "", ("folder",), label="a config"), folder=folder)


def to_toml(config: Config) -> str:
    """The config as TOML; `load` reads it back equal."""
    return tomli_w.dumps(to_dict(config))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain values; `load` reads it back equal."""
    return {each.name: getattr(config, each.name) for each in fields(config) if each.compare}


def data_folders(data_dir: Path | None = None) -> tuple[Path, ...]:
    """Where data sets lie: `data_dir`, else where the data room looks by default."""
    return default_folders() if data_dir is None else (data_dir.expanduser(),)


def _read(path: Path) -> Section:
    try:
        text = path.read_text("utf-8")
        return tomllib.loads(text)
    except FileNotFoundError:
        guess = nearest(
            path.name, [each.name for each in path.parent.glob("*.toml") if each.name != "pyproject.toml"]
        )
        hint = (
            f"did you mean {path.with_name(guess)}?" if guess else "`coterie init` writes a starter project"
        )
        raise ConfigError(f"{path}: there is no such file", hint) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder", "name the TOML file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})", "is it a TOML file?") from None
    except tomllib.TOMLDecodeError as error:
        said, line, column = _locate(str(error), text)
        shown = text.splitlines()[line - 1 : line]
        raise ConfigError(
            f"{path}:{line}:{column}: {said}", f"the line is: {shown[0].strip()}" if shown else ""
        ) from None


def _locate(message: str, text: str) -> tuple[str, int, int]:
    """tomllib says where only in its message."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if found:
        return message[: found.start()], int(found[1]), int(found[2])
    lines = text.split("\n")
    return message.removesuffix(" (at end of document)"), len(lines), len(lines[-1]) + 1


def _set(raw: Section, override: str) -> None:
    """Put "a.b=value" into nested tables and lists, in place."""
    path, equals, value = override.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: expected a.b=value", "for example: --set schedule.rounds=5")
    holder: Any = raw
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(holder, list):
            if not name.isdecimal() or int(name) >= len(holder):
                raise ConfigError(
                    f"--set {override}: {'.'.join(names[:depth])} has {len(holder)} entries, from 0"
                )
            index: Any = int(name)
        elif isinstance(holder, dict):
            index = name
        else:
            said = f"{'.'.join(names[:depth])} = {holder!r} is not a table, so it has no {name!r}"
            raise ConfigError(f"--set {override}: {said}")
        if last:
            holder[index] = _value(value.strip())
        else:
            holder = holder[index] if isinstance(holder, list) else holder.setdefault(index, {})


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _kinds(section: Section, where: str) -> None:
    if "kind" not in section:
        raise ConfigError(f"{where}.kind: missing", f'write kind = "..." in {where}')
    parts.convert(section["kind"], str, f"{where}.kind")
