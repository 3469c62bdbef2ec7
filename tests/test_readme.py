"""The README and the docs tell the truth: their code runs, their configs fit, their commands parse, their links end.

A block is left out only by a comment in front of it, with the reason: <!-- not run: downloads torch -->
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import coterie as ct
from coterie.algorithms import ALGORITHMS
from coterie.cli import app
from coterie.data import DATASETS, PARTITIONS
from coterie.experiment import assemble, report, starter
from coterie.experiment import load as load_config
from coterie.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOT_RUN = r"(?:<!-- not run: ([^\n]*\w[^\n]*) -->\n)?"
BLOCK = re.compile(NOT_RUN + r"```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: where it is, and what is in it."""

    page: Path
    line: int
    language: str
    code: str


def read(page: Path) -> Iterator[Block]:
    """The blocks of a page that are to be run."""
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        reason, language, code = found.groups()
        if not reason and page.name != "CONTRIBUTING.md":  # its code is test_contributing.py's
            yield Block(page, text[: found.start()].count("\n") + 1, language, code)


BLOCKS = [block for page in PAGES for block in read(page)]


def blocks(language: str) -> Any:
    """Parametrise by the blocks of a language."""
    chosen = [block for block in BLOCKS if block.language == language]
    names = [f"{block.page.relative_to(ROOT)}:{block.line}" for block in chosen]
    return pytest.mark.parametrize("block", chosen, ids=names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COTERIE_DATA", str(tmp_path))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    starter.write(tmp_path)
    rows = [f"p{i},{'ABC'[i % 3]},{i % 7},{i * i % 11},{'yes' if i % 5 == 0 else 'no'}" for i in range(90)]
    (tmp_path / "stays.csv").write_text("\n".join(["patient,hospital,age,lactate,died", *rows]) + "\n")
    (tmp_path / "train.py").write_text("def fit(model, data, context): ...\n")
    return tmp_path


@blocks("python")
def test_python(block, folder, monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder: folder)  # it costs time, and has tests of its own
    code = compile(block.code, f"{block.page}, block in line {block.line}", "exec")
    exec(code, {"__name__": "__main__"})


def whole(code: str) -> dict[str, Any]:
    """A block's config; what it leaves out is the README's."""
    (readme,) = (tomllib.loads(b.code) for b in BLOCKS if b.language == "toml" and b.page.name == "README.md")
    found = tomllib.loads(code)
    return found if {"name", "data", "model", "algorithm", "schedule"} <= set(found) else {**readme, **found}


@blocks("toml")
def test_toml(block, folder):
    config = whole(block.code)
    if config["algorithm"]["kind"] == "scaffold" and "backend" in config:
        config["algorithm"] = {"kind": "fedavg", "client": {"lr": 0.1}}  # a trainer of one's own needs it
    assemble(load_config(config))


def test_the_readmes_experiment_runs_and_leaves_what_the_docs_say(folder):
    result = ct.run({**whole(""), "run": {"tensorboard": False}}, out=folder / "run")
    page = (DOCS / "guide" / "runs-reports-resume.md").read_text("utf-8")

    def named(heading: str) -> set[str]:
        """What the first column of the table below a heading lists."""
        table = re.search(rf"^#+ {re.escape(heading)}\n[^#]*?((?:^\|.*\n)+)", page, re.MULTILINE)
        return {name for row in table[1].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}

    files = {path.name + "/" * path.is_dir() for path in result.folder.iterdir()}
    assert files == named("The run folder")
    found = json.loads((result.folder / "result.json").read_text())
    assert set(found) | {"error"} == named("result.json")
    row = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert set(row) == named("metrics.jsonl")
    assert result.final["accuracy"] > 0.5


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Raise a usage error where the real command line would; run nothing."""
    if hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        parse(command.commands[words[0]], words[1:], parent)
    else:
        command.make_context("coterie", list(words), parent=parent)


CHEAP = {"init", "data", "doctor"}


@blocks("sh")
def test_sh(block, folder):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in block.code.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert set(words) <= targets
            continue
        assert program == "coterie", f"{line}: not known here; say why it is not run"
        parse(typer.main.get_command(app), words)
        if words[0] in CHEAP:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
        elif words[0] == "run":
            settings = [word for before, word in pairwise(words) if before == "--set"]
            path = folder / words[1]
            config = load_config(path if path.exists() else folder / path.name, settings)
            if config.data["dataset"] == "digits":  # the others need files
                assemble(config)


def test_a_block_that_is_wrong_is_found(folder, monkeypatch):
    with pytest.raises(ct.ConfigError):
        test_toml(Block(ROOT, 1, "toml", "[model]\nkind = 'mlpp'\n"), folder)
    with pytest.raises(AttributeError):
        test_python(Block(ROOT, 1, "python", "import coterie\ncoterie.rnu()\n"), folder, monkeypatch)
    for line in ("make dinner", "coterie fly", "rm -r x"):
        with pytest.raises(AssertionError):
            test_sh(Block(ROOT, 1, "sh", line), folder)
    with pytest.raises(Exception, match="No such option"):
        test_sh(Block(ROOT, 1, "sh", "coterie run x.toml --fast"), folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_end_somewhere(page):
    text = page.read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([\w-]*)\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor and page.parent == ROOT:  # mkdocs checks those in docs/
            headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    for path in re.findall(r"`((?:src|tests|examples|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_readme_names_every_kind_and_every_room():
    text = (ROOT / "README.md").read_text("utf-8").lower()
    letters = re.sub(r"[^a-z0-9]", "", text)
    kinds = {*ALGORITHMS, *PARTITIONS, *SCHEDULES, *DATASETS}
    assert [kind for kind in sorted(kinds) if re.sub(r"[^a-z0-9]", "", kind) not in letters] == []
    rooms = {path.name for path in (ROOT / "src" / "coterie").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(re.findall(r"^  (\w+)/ ", text, re.MULTILINE))


def test_the_guide_says_of_every_algorithm_when_to_use_it():
    text = (DOCS / "guide" / "algorithms.md").read_text("utf-8")
    table = text.partition("## Which one?")[2].partition("\n## ")[0]
    advised = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in row.split(", ")]
    assert sorted(advised) == sorted(f"`{kind}`" for kind in ALGORITHMS)
