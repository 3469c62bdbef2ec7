"""`coterie data`: which data sets and partitions there are, and what a partition looks like."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.compare import check_picture
from coterie.cli.progress import emit

if TYPE_CHECKING:
    from coterie.data import Statistics
    from coterie.experiment.config import Config

SHADES = " ░▒▓█"
SHOWN = 20
DEFAULT = {"kind": "iid", "clients": 10}

data = typer.Typer(no_args_is_help=True, help="List data sets, show one, draw a partition.")
DataDir = Annotated[Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@data.command("list")
def list_parts(as_json: AsJson = False) -> None:
    """List the data sets and partitions that a config can name, and the keys of each."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from coterie.data import DATASETS, PARTITIONS  # noqa: PLC0415
    from coterie.experiment import parts  # noqa: PLC0415

    tables = {
        "dataset": parts.describe(DATASETS, ("folders",)),
        "partition": parts.describe(PARTITIONS, ("examples", "key")),
    }
    if as_json:
        emit(
            {
                noun: [
                    part._asdict() | {"settings": [each._asdict() for each in part.settings]}
                    for part in found
                ]
                for noun, found in tables.items()
            }
        )
        return
    for noun, found in tables.items():
        table = Table(noun, "what it is", "keys", box=None)
        for part in found:
            keys = (each.name if each.required else f"{each.name} = {each.default}" for each in part.settings)
            table.add_row(part.kind, part.summary, ", ".join(keys))
        Console(highlight=False).print(table)


@data.command()
def show(
    name: Annotated[str, typer.Argument(help="A data set.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show a data set's size, shape, classes and the columns that it can be partitioned by."""
    from coterie.experiment.assemble import load_dataset  # noqa: PLC0415
    from coterie.experiment.config import load  # noqa: PLC0415

    dataset = load_dataset(load(_config(name)), data_dir)
    train, test = dataset.train, dataset.test
    found = {
        "name": dataset.name,
        "train": len(train),
        "test": len(test) if test is not None else 0,
        "input_shape": dataset.input_shape,
        "classes": dataset.classes,
        "keys": list(train.keys),
    }
    if as_json:
        emit(found)
        return
    for title, value in found.items():
        typer.echo(f"{title.replace('_', ' ')}: {_short(value)}")


@data.command()
def partition(
    source: Annotated[str, typer.Argument(metavar="CONFIG_OR_NAME", help="A config, or a data set's name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="For example data.partition.clients=50."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw it into FILE.png or FILE.html.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show who holds what under a config's partition, without training."""
    from coterie.data import describe  # noqa: PLC0415
    from coterie.experiment.assemble import load_dataset, load_population  # noqa: PLC0415
    from coterie.experiment.config import load  # noqa: PLC0415

    check_picture(out)
    is_file = source.endswith(".toml") or Path(source).is_file()
    config = load(Path(source) if is_file else _config(source), overrides or ())
    dataset = load_dataset(config, data_dir)
    population = load_population(config, dataset)
    statistics = describe(dataset.train, population.partition, dataset.classes)
    found = _measured(config, statistics)
    if as_json:
        emit(found)
    else:
        _print(found)
    if out:
        _draw(found, out)
        typer.echo(f"written: {out}", err=True)


def _config(dataset: str) -> dict[str, Any]:
    """A config around nothing but a data set, so that --set has the same paths for both."""
    unused = {section: {"kind": "none"} for section in ("model", "algorithm", "schedule")}
    return {"name": "partition", "data": {"dataset": dataset, "partition": DEFAULT}, **unused}


def _measured(config: Config, statistics: Statistics) -> dict[str, Any]:
    """The statistics as JSON values; `clients` and `labels` as in a run's clients.json."""
    return {
        "dataset": config.data["dataset"],
        "partition": config.data["partition"],
        **{name: getattr(statistics, name) for name in ("smallest", "median", "largest", "gini")},
        **{name: getattr(statistics, name) for name in ("mean_jensen_shannon", "mean_earth_mover")},
        "labels": statistics.labels,
        "of": statistics.among,
        "clients": [
            {"client": client, "train": size, "labels": counts}
            for client, size, counts in zip(
                statistics.clients, statistics.sizes.tolist(), statistics.counts.tolist(), strict=True
            )
        ],
    }


def _print(found: Mapping[str, Any]) -> None:
    """Print the statistics, and a row for each of the first clients with a shade for each label."""
    clients = found["clients"]
    width = max(len(client["client"]) for client in clients[:SHOWN])
    for client in clients[:SHOWN]:
        most = max(client["labels"])
        shades = (SHADES[round((len(SHADES) - 1) * (count / most) ** 0.5)] for count in client["labels"])
        typer.echo(f"{client['client']:{width}} {client['train']:8,d}  |{''.join(shades)}|")
    if found["of"] > SHOWN:
        typer.echo(f"... and {found['of'] - SHOWN:,} more clients")
    measured = f" (measured on {len(clients):,} of them)" if found["of"] > len(clients) else ""
    typer.echo(
        f"{found['dataset']}, {found['partition']['kind']}: "
        f"{found['of']:,} clients{measured}, {len(found['labels'])} labels\n"
        f"examples a client: {found['smallest']:,} to {found['largest']:,}, "
        f"median {found['median']:g}, Gini {found['gini']:.3f}\n"
        f"mean distance to all data: Jensen-Shannon {found['mean_jensen_shannon']:.3f}, "
        f"earth mover's {found['mean_earth_mover']:.3f}"
    )


def _draw(found: Mapping[str, Any], out: Path) -> None:
    from coterie.experiment import pages, plots  # noqa: PLC0415

    figure = plots.partition_heatmap(found)
    if out.suffix == ".png":
        plots.to_png(figure, out)
        return
    title = escape(f"{found['dataset']}: {found['partition']['kind']}")
    pages.replace(out, pages.page("Partition", pages.card(title, plots.to_svg(figure), wide=True)))


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value[:SHOWN])) + f", ... ({len(value)})" * (len(value) > SHOWN)
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)
