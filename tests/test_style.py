"""House rules that a machine can check."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "coterie"
ROOMS = sorted({path.parent for path in SOURCE.rglob("*.py")})
FILES = sorted(SOURCE.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).parts)


def public_names(tree: ast.Module, room: str) -> set[str]:
    """Public names that a room's index defines or takes from the room's own files."""
    names = set()
    for node in tree.body:
        match node:
            case ast.ImportFrom(module=origin, names=aliases, level=level) if (
                level == 1 or f"{origin}.".startswith(f"{room}.")
            ):
                names |= {alias.asname or alias.name for alias in aliases}
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return {name for name in names if not name.startswith("_")}


def by_kind(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order ruff (RUF022) sorts `__all__` in."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("room", ROOMS, ids=dotted)
def test_index_is_complete_and_sorted(room):
    index = room / "__init__.py"
    assert index.exists(), f"{dotted(room)} has no index"
    tree = ast.parse(index.read_text())
    module = importlib.import_module(dotted(room))
    assert ast.get_docstring(tree)
    assert public_names(tree, dotted(room)) <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    public = [
        name for name in module.__all__ if not name.startswith("_")
    ]  # coterie.__version__ may stand anywhere
    assert public == sorted(set(public), key=by_kind)


def test_public_names_are_found():
    source = (
        "import os\nfrom typing import Any\nfrom coterie.core import trees\nfrom coterie.roommate import x\n"
    )
    source += "from .a import b as c, _d\nfrom coterie.room.e import F\nfrom coterie.room import g\n"
    source += "H = 1\n_i = 2\nJ: int = 3\ndef k(): ...\nclass L: ...\n"
    assert public_names(ast.parse(source), "coterie.room") == {"c", "F", "g", "H", "J", "k", "L"}


def test_the_page_a_newcomer_reads_first_is_short():
    assert len((SOURCE / "core" / "types.py").read_text().splitlines()) < 200


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "__import__"}


def unsafe(source: str) -> Iterator[str]:
    """Describe whatever in `source` can turn data into code (law 4)."""
    tree = ast.parse(source)
    torch_names = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torch_names |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {n.name}" for n in names if n.name.split(".")[0] in PICKLES)
            case ast.ImportFrom(module=str(origin), names=names):
                if origin.split(".")[0] in PICKLES or (
                    origin == "torch" and {"load", "save"} & {n.name for n in names}
                ):
                    yield f"from {origin} import ..."
            case ast.Name(id=name) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(id=name), attr="load" | "save") if name in torch_names:
                yield f"torch.{node.attr}"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield "allow_pickle=True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: dotted(path.with_suffix("")))
def test_data_never_becomes_code(path):
    assert list(unsafe(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from joblib.externals import thing",
        "import cloudpickle",
        "eval('1')",
        "run = exec",
        "import torch\ntorch.load('x')",
        "import torch as t\nreader = t.load",
        "from torch import load as read",
        "import torch\ntorch.save({}, 'x')",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_found(source):
    assert len(list(unsafe(source))) == 1


@pytest.mark.parametrize(
    "source", ["model.eval()", "np.load(file, allow_pickle=False)", "from torch import nn", "json.load(f)"]
)
def test_safe_code_passes(source):
    assert list(unsafe(source)) == []


def requirements() -> dict[str, set[str]]:
    """Names in pyproject.toml: what everyone installs, the extras and the dependency groups."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())

    def names(*groups: list) -> set[str]:
        lines = [
            line for group in groups for line in group if isinstance(line, str)
        ]  # others are include-group
        return {canonicalize_name(Requirement(line).name) for line in lines} - {"coterie"}

    project = config["project"]
    return {
        "build": names(config["build-system"]["requires"]),
        "runtime": names(project["dependencies"]),
        "extras": names(*project.get("optional-dependencies", {}).values()),
        "groups": names(*config.get("dependency-groups", {}).values()),
    }


def test_every_dependency_has_its_reason():
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert {canonicalize_name(row) for row in rows} == set().union(*requirements().values())


def test_constraints_pin_what_is_installed_from_pyproject():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())
    declared = requirements()
    assert declared["runtime"] | declared["groups"] <= set(pins)
