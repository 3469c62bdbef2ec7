"""Fills the pages from the code when the site is built, so that no list of options is typed twice.

`<!-- table: NAME -->` becomes a table of what a config can name there (the function in TABLES),
`<!-- room: NAME -->` the reference of a room, file by file, and `<!-- include: FILE -->` a file of the
repository's root.
"""

import ast
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import griffe
import typer

import coterie
from coterie.algorithms import ALGORITHMS, OPTIMIZERS, Local
from coterie.backends.system import AVAILABILITY, COMPUTE, DURATIONS, NETWORK
from coterie.cli import app
from coterie.data import DATASETS, PARTITIONS
from coterie.experiment.assemble import AGGREGATORS
from coterie.experiment.config import Config, backend_settings, data_settings, run_settings
from coterie.experiment.parts import Setting, describe
from coterie.models import MODELS
from coterie.schedules import SCHEDULES, STALENESS

ROOT = Path(__file__).parents[1]
Rows = list[list[str]]


def kinds(table: Mapping[str, Callable[..., Any]], provided: Collection[str] = ()) -> str:
    """One row a function: the kinds it has, the first line of its docstring, its keys."""
    rows: Rows = []
    for part in describe(table, provided):
        said = [escaped(part.summary), "<br>".join(map(key, part.settings))]
        if rows and rows[-1][1:] == said:
            rows[-1][0] += f", `{part.kind}`"
        else:
            rows.append([f"`{part.kind}`", *said])
    return markdown(["kind", "what it is", "keys"], rows)


def keys(function: Callable[..., Any], provided: Collection[str] = ()) -> str:
    """One row a key: its name, its type, its default."""
    (part,) = describe({"": function}, provided)
    rows = [
        [f"`{each.name}`", escaped(each.type), "required" if each.required else f"`{default(each)}`"]
        for each in part.settings
    ]
    return markdown(["key", "type", "default"], rows)


def algorithms() -> str:
    """One row an algorithm: its kind, its paper (the first line of its file), its keys."""
    rows = []
    for part in describe(ALGORITHMS, ("local", "server", "population", "aggregator")):
        function = ALGORITHMS[part.kind]
        named = inspect.signature(function).parameters
        sections = {"client": "local", "server": "server", "aggregator": "aggregator"}
        tables = [f"`{section}` table" for section, name in sections.items() if name in named]
        papers = (inspect.getdoc(inspect.getmodule(function)) or "").partition("\n")[0].split("; ")
        paper = next((each for each in papers if each.lower().startswith(f"{part.kind}:")), papers[0])
        what = f"{escaped(part.summary)}<br>{cited(paper.partition(': ')[2])}"
        rows.append([f"`{part.kind}`", what, "<br>".join([*tables, *map(key, part.settings)])])
    return markdown(["kind", "what it does, and its paper", "keys"], rows)


def config() -> str:
    """One row a section of a config, with what it is when left out."""
    rows = []
    for each in fields(Config):
        if each.name != "folder":
            value = each.default if each.default_factory is MISSING else each.default_factory()
            shown = "required" if value is MISSING else f"`{json.dumps(value)}`"
            rows.append([f"`{each.name}`", shown])
    return markdown(["key", "when left out"], rows)


def commands() -> str:
    """A section for each command: its help, its arguments and its options."""
    found: list[str] = []
    columns = ["argument or option", "what it does"]

    def walk(command: Any, name: str) -> None:
        if hasattr(command, "commands"):
            for sub, child in command.commands.items():
                walk(child, f"{name} {sub}")
            return
        rows: Rows = []
        arguments = []
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            if parameter.param_type_name == "argument":
                word = (parameter.metavar or parameter.name.upper()).strip("[]")
                arguments.append(word if parameter.required else f"[{word}]")
                rows.append([f"`{word}`", escaped(parameter.help)])
            else:
                value = parameter.metavar or ("" if parameter.is_flag else "PATH")
                rows.append([f"`{', '.join(parameter.opts)} {value}".rstrip() + "`", escaped(parameter.help)])
        usage = " ".join([name, *arguments, "[OPTIONS]"])
        found.append(f"## `{name}`\n\n{command.help}\n\n```text\n{usage}\n```\n\n{markdown(columns, rows)}")

    walk(typer.main.get_command(app), "coterie")
    return "\n\n".join(found)


def api() -> str:
    """One row a room: the names that `import coterie` gives from it."""
    rooms: dict[str, list[str]] = {}
    for name in coterie.__all__:
        rooms.setdefault(getattr(coterie, name).__module__.split(".")[1], []).append(f"`{name}`")
    rows = [[f"[{room}]({room}.md)", ", ".join(names)] for room, names in sorted(rooms.items())]
    return markdown(["room", "names"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "api": api,
    "aggregators": lambda: kinds(AGGREGATORS),
    "algorithms": algorithms,
    "availability": lambda: kinds(AVAILABILITY, ("key", "folder")),
    "client": lambda: keys(Local, ("optimizer",)),
    "commands": commands,
    "compute": lambda: kinds(COMPUTE, ("key", "folder")),
    "config": config,
    "data": lambda: keys(data_settings),
    "datasets": lambda: kinds(DATASETS, ("folders",)),
    "durations": lambda: kinds(DURATIONS, ("key",)),
    "models": lambda: kinds(MODELS, ("input_shape", "outputs")),
    "network": lambda: kinds(NETWORK, ("key", "folder")),
    "optimizers": lambda: kinds(OPTIMIZERS),
    "partitions": lambda: kinds(PARTITIONS, ("examples", "key")),
    "backend": lambda: keys(backend_settings),
    "run": lambda: keys(run_settings),
    "schedules": lambda: kinds(SCHEDULES, ("key", "size", "on_nan")),
    "staleness": lambda: kinds(STALENESS),
}


def on_page_markdown(text: str, **_: Any) -> str:
    """Fill in tables and files; mkdocs calls this for each page."""
    text = re.sub(r"<!-- table: (\w+) -->", lambda found: TABLES[found[1]](), text)
    text = re.sub(r"<!-- room: (\w+) -->", lambda found: room(found[1]), text)
    return re.sub(r"<!-- include: ([\w.]+) -->", lambda found: included(found[1]), text)


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings that were written to be read as text."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Mend the docstring of anything that griffe finds; records also show their fields and comments."""
        if not obj.docstring:
            return
        text = obj.docstring.value
        if isinstance(obj, griffe.Module) and isinstance(obj.filepath, Path):
            tree = ast.parse(obj.filepath.read_text("utf-8"))
            text = ast.get_docstring(tree, clean=False) or text  # clean dedents a last paragraph of formulas
        text = re.sub(r"<(?=[a-z]+>)", "&lt;", text)
        text = re.sub(r"(?m)^\w+\n([├│└].*(\n|\Z))+", "```text\n\\g<0>\n```\n", text)
        text = re.sub(r"(?m)^(?!- )(.+)\n(?=- )", r"\1\n\n", text)
        if isinstance(obj, griffe.Class) and (drawn := record_fields(obj)):
            text += f"\n\n```python\n{drawn}\n```"
        obj.docstring.value = text


def record_fields(record: griffe.Class) -> str:
    """The lines of a class that declare its public fields."""
    lines = textwrap.dedent(record.source).splitlines()
    (tree,) = ast.parse("\n".join(lines)).body
    nodes = [node for node in getattr(tree, "body", ()) if isinstance(node, ast.AnnAssign)]
    shown = [
        line.removeprefix("    ")
        for node in nodes
        if not ast.unparse(node.target).startswith("_")
        for line in lines[node.lineno - 1 : node.end_lineno]
    ]
    return "\n".join(shown)


def included(name: str) -> str:
    """A file of the root, its links seen from docs/."""
    return (ROOT / name).read_text("utf-8").replace("](docs/", "](")


def room(name: str) -> str:
    """The room's docstring, then its files, each with what the room's `__all__` takes from it.

    Of core, which algorithms are written with, every file is shown, with all that is public in it.
    """
    index = importlib.import_module(f"coterie.{name}")
    blocks = [f"# {name}\n\n::: coterie.{name}\n    options: {{ members: false }}"]
    paths = Path(index.__file__ or "").parent.glob("[a-z]*.py")
    for path in sorted(paths, key=lambda path: (path.stem != "types", path)):
        module = f"coterie.{name}.{path.stem}"
        origin = {each: getattr(getattr(index, each), "__module__", "") for each in index.__all__}
        members = [each for each, home in origin.items() if home == module]
        if members or name == "core":
            chosen = "" if name == "core" else f", members: {members}"
            blocks.append(f"## {path.stem}\n\n::: {module}\n    options: {{ heading_level: 3{chosen} }}")
    return "\n\n".join(blocks)


def key(setting: Setting) -> str:
    """A key with its type, or with its default."""
    if setting.required:
        return f"`{setting.name}`: {escaped(setting.type)}"
    return f"`{setting.name} = {default(setting)}`"


def default(setting: Setting) -> str:
    """A default as TOML would write it."""
    if callable(setting.default):  # the discounts of staleness are functions
        return '{ kind = "polynomial" }'
    return "none" if setting.default is None else json.dumps(setting.default)


def cited(text: str) -> str:
    """Link the arXiv numbers."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", escaped(text))


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def markdown(columns: list[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
