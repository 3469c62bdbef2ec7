"""The files in deploy/ call commands with options that there are."""

import re
from pathlib import Path

import pytest
import typer

from coterie.cli import app

DEPLOY = Path(__file__).parents[1] / "deploy"
OPTIONS = {
    name: {option for each in command.params for option in each.opts}
    for name, command in typer.main.get_command(app).commands.items()
}


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("compose.yaml", "server"),
        ("compose.yaml", "site"),
        ("kubernetes/server.yaml", "server"),
        ("kubernetes/site.yaml", "site"),
        ("systemd/coterie-server.service", "server"),
        ("systemd/coterie-site.service", "site"),
    ],
)
def test_its_options_are_the_command_s(file, command):
    text = re.sub(r"(?m)^\s*#.*$", "", (DEPLOY / file).read_text())
    if file == "compose.yaml":
        (text,) = re.findall(rf'command: (\["{command}",.*?\])', text, re.DOTALL)
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert used <= OPTIONS[command]
    assert used
