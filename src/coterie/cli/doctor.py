"""`coterie doctor`: what is installed, what there is to compute on, and which data sets are at hand."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Annotated, Any

import typer

from coterie.cli.progress import emit


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Show versions, devices, extras and data sets."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    found = facts()
    if as_json:
        emit(found)
        return
    table = Table(box=None, show_header=False)
    for name in ("coterie", "python", "platform"):
        table.add_row(name, found[name])
    table.add_row("cpu", f"{found['cpus']} cores; torch uses {found['threads']} threads")
    table.add_row("devices", ", ".join(found["devices"]))
    table.add_row("kernels", found["kernels"] or "none (no C compiler): torch does their work, more slowly")
    table.add_row(
        "packages", ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    )
    for name, extra in found["extras"].items():
        table.add_row(f"extra {name}", "found" if extra["found"] else f"not found: {extra['install']}")
    for folder, names in found["data"].items():
        said = "no such folder" if names is None else ", ".join(names) or "empty"
        table.add_row("data", f"{folder}: {said}")
    Console(highlight=False).print(table)


def facts() -> dict[str, Any]:
    """What `doctor` shows, as JSON values. data: {folder: its subfolders, or None where it is missing}."""
    import torch  # noqa: PLC0415

    from coterie.core.native import library  # noqa: PLC0415
    from coterie.experiment.config import data_folders  # noqa: PLC0415

    packages, extras = _requirements()
    devices = ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "coterie": metadata.version("coterie"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "kernels": library() and "in C, compiled for this processor",
        "extras": {
            extra: {"found": all(map(_version, names)), "install": f"pip install 'coterie[{extra}]'"}
            for extra, names in extras.items()
        },
        "data": {
            str(folder): sorted(each.name for each in folder.iterdir() if each.is_dir())
            if folder.is_dir()
            else None
            for folder in data_folders()
        },
    }


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The names of the packages that Coterie needs, and those of each extra."""
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("coterie") or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra *== *['\"]([\w-]+)", line)
        assert name
        (extras.setdefault(extra[1], []) if extra else needed).append(name[0])
    return needed, extras


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
