"""How every picture looks, and how it becomes SVG or PNG.

Figures are drawn in the colours of the light theme; `to_svg` swaps each for a CSS variable (their
values are in report.css), so that one picture suits a light page, a dark page and paper.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1b2330", "#5b6675", "#e4e8ed", "#ffffff"
FEDERATED, CENTRALISED, LOCAL = "#0068a8", "#b84a00", "#667081"
UP, DOWN = "#00795b", "#94407a"
PALETTE = (FEDERATED, CENTRALISED, UP, DOWN, "#8a6a00", "#3f3fa8", LOCAL)
THEME = {
    INK: "currentColor",
    MUTED: f"var(--muted, {MUTED})",
    GRID: f"var(--grid, {GRID})",
    PAPER: f"var(--paper, {PAPER})",
    FEDERATED: f"var(--federated, {FEDERATED})",
    CENTRALISED: f"var(--centralised, {CENTRALISED})",
    LOCAL: f"var(--local, {LOCAL})",
    UP: f"var(--up, {UP})",
    DOWN: f"var(--down, {DOWN})",
    PALETTE[4]: f"var(--ochre, {PALETTE[4]})",
    PALETTE[5]: f"var(--indigo, {PALETTE[5]})",
}

styled = style.context(
    [
        "default",  # whatever the user's matplotlibrc says, the report looks the same
        {
            "font.size": 12,
            "text.color": INK,
            "text.parse_math": False,  # a label with dollar signs is no formula
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.titlecolor": MUTED,
            "axes.titlepad": 10,
            "axes.labelcolor": MUTED,
            "axes.facecolor": "none",
            "axes.edgecolor": GRID,
            "axes.spines.left": False,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": GRID,
            "grid.linewidth": 1,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
            "lines.linewidth": 2.2,
            "lines.solid_capstyle": "round",
            "lines.solid_joinstyle": "round",
            "figure.facecolor": "none",
            "figure.dpi": 200,
            "svg.fonttype": "none",
            "svg.hashsalt": "coterie",
        },
    ]
)


@styled
def to_svg(fig: Figure) -> str:
    """The figure as an SVG element to put into a page: themed, scalable, text as text, same bytes each time.

    Ids are kept only where something refers to them, and carry a hash of the picture, so that many
    pictures can share a page.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The viewer's fonts draw the text, so glyphs that are missing here do not matter.
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from font", UserWarning)
        fig.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"

    def adapt(match: re.Match[str]) -> str:
        tag: str = match[0]
        if tag.startswith("<svg"):
            label = html.escape(str(fig.get_label()))
            tag = re.sub(r' (width|height)="[^"]*"', "", tag)
            tag = tag.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", tag)
        tag = re.sub(r'(href="|url\()#', rf"\1#{prefix}", tag)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: THEME.get(m[0], m[0]), tag)

    return re.sub(r"<[^>]*>", adapt, svg)  # tags only: what a label says is left alone


@styled
def to_png(fig: Figure, path: Path) -> None:
    """The figure as a PNG file on white, 200 dots an inch."""
    fig.savefig(path, format="png", facecolor=PAPER)
