"""The HTML that reports are made of: one file, no script, nothing fetched.

Titles of pages and names of rows are escaped here; content, notes and cells are HTML already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from coterie.experiment.theme import THEME
from coterie.storage import write_atomic

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """A whole page around the body, with report.css inside and a policy that forbids every request."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return PAGE.format(title=escape(title), css=css, body=body)


def card(title: str, content: str = "", note: str = "", *, wide: bool = False) -> str:
    """A titled box for one picture, table or text, and a note below it."""
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="card{" wide" * wide}"><h2>{title}</h2>{content}{note}</section>\n'


def table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table of `row`s that scrolls by itself where the page is narrow."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{body}</div>'


def row(name: str, color: str, cells: Iterable[str]) -> str:
    """A row of a table: a key in a colour of the theme, the name, the cells."""
    key = f'<span class="key" style="color: {THEME[color]}"></span>'
    return f'<tr><th scope="row">{key}{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def replace(path: Path, text: str) -> Path:
    """Write the file whole or not at all, and return its path. Raises RunError when the disk refuses."""
    write_atomic(path, text.encode("utf-8", errors="replace"))
    return path
