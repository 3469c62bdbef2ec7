"""Law 7: imports go down only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "coterie"

# What each room may import besides itself. A new room needs a line here and in the design.
KNOWS: dict[str, set[str]] = {
    "core": set(),
    "aggregators": {"core"},
    "transforms": {"core"},
    "privacy": {"core"},
    "security": {"core"},
    "schedules": {"core"},
    "data": {"core"},
    "models": {"core"},
    "storage": {"core"},
    "algorithms": {"core", "aggregators"},
    "parallel": {"core", "transforms"},
    "trainers": {"core", "data", "parallel"},
    "backends": {"core", "storage", "security"},
    "dashboard": {"storage"},
}
KNOWS["experiment"] = set(KNOWS) - {"dashboard"}
KNOWS["__main__"] = {"cli"}
KNOWS["cli"] = {"backends", "core", "data", "errors", "experiment", "privacy", "security", "storage"}
for known in KNOWS.values():
    known.add("errors")
KNOWS["errors"] = set()
FACE = "__init__"  # coterie/__init__.py shows the public names of every room, so no room may import it


def imported(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import; `module` is the file's own, with any .__init__."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                above = module.split(".")[:-level] if level else []
                base = ".".join([*above, *([origin] if origin else [])])
                yield from ((node.lineno, f"{base}.{name.name}") for name in names)
            case ast.Call(
                func=ast.Name(id="__import__") | ast.Name(id="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield node.lineno, name
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]):
                yield node.lineno, name


def upward_imports(source: str, module: str) -> list[str]:
    """Describe each import in `source` that its room may not have."""
    room = module.split(".")[1]
    if room == FACE:
        return []
    if room not in KNOWS:
        return [f"{module}: room {room!r} is not in the table of tests/test_imports.py"]
    wrong = []
    for line, name in imported(ast.parse(source), module):
        package, _, rest = name.partition(".")
        if package != "coterie":
            continue
        target = rest.split(".")[0]
        if target not in KNOWS:
            wrong.append(f"{module}:{line} imports {name}: no such room, or the package's face")
        elif target != room and target not in KNOWS[room]:
            wrong.append(f"{module}:{line} imports {name}: {room} may know only {sorted(KNOWS[room])}")
    return wrong


FILES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")
}


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down_only(module):
    assert upward_imports(FILES[module].read_text(), module) == []


def test_the_table_has_no_circle():
    reachable = {room: set(known) for room, known in KNOWS.items()}
    for _ in KNOWS:
        for known in reachable.values():
            known.update(*(reachable[room] for room in known))
    assert [room for room, known in reachable.items() if room in known] == []


@pytest.mark.parametrize(
    "line",
    [
        "import coterie",
        "import coterie.storage.runs",
        "from coterie import trainers",
        "from coterie import __version__",
        "from coterie.backends import inprocess",
        "from coterie.nowhere import thing",
        "from .. import storage",
        "from ..storage import runs",
        "from ..storage.runs import Run",
        "def late():\n    from coterie.cli import main",
        "if TYPE_CHECKING:\n    from coterie.experiment import run",
        "import importlib\nimportlib.import_module('coterie.storage')",
        "from importlib import import_module\nimport_module('coterie.storage')",
        "__import__('coterie.storage')",
    ],
)
def test_an_arrow_upwards_is_found(line):
    assert len(upward_imports(line, "coterie.models.made_up")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "import coteries.storage",
        "from coterie.core.types import Tree",
        "from coterie import core",
        "from coterie.models import networks",
        "from ..core import trees",
        "from . import networks",
        "from .networks import mlp",
    ],
)
def test_arrows_downwards_and_sideways_within_a_room_pass(line):
    assert upward_imports(line, "coterie.models.made_up") == []


def test_relative_imports_of_a_room_index_start_at_the_room():
    assert upward_imports("from .storage import x", "coterie.models.__init__") == []
    assert len(upward_imports("from ..storage import x", "coterie.models.__init__")) == 1


def test_an_unknown_room_is_found():
    assert len(upward_imports("", "coterie.cellar.wine")) == 1
    assert len(upward_imports("", "coterie.tool")) == 1


def test_the_public_face_may_import_anything():
    assert upward_imports("from coterie.experiment import run", "coterie.__init__") == []
