"""What an audit found: the empirical lower bound beside the promised upper bound, as data and as HTML."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from coterie.privacy.audits.images import png

WIDTH = 240  # pixels of the bar in HTML


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """One attack's result. Bounds are of epsilon at `delta`; None: no such bound is claimed.

    kind: "canaries", "membership", "labels", "inversion". unit: whose presence was guessed, in words.
    promised: the accountant's upper bound. lower_bound: at this `confidence`, under the assumptions.
    refuted: the promise as a whole curve was found false, which a test can show where a bound at one delta
    stays below the promise. measures: what else was measured (accuracies, PSNR), for people to read.
    """

    kind: str
    unit: str = "example"
    promised: float | None = None
    lower_bound: float | None = None
    delta: float = 0.0
    confidence: float = 0.95
    refuted: bool = False
    measures: Mapping[str, float] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    @property
    def violated(self) -> bool:
        """The promise is false at this confidence (one honest audit in 20 says so at 95 %, or fewer)."""
        above = self.promised is not None and (self.lower_bound or 0.0) > self.promised
        return self.refuted or above

    @property
    def verdict(self) -> str:
        """In words."""
        if self.violated:
            return "the promise is broken"
        return "nothing was promised" if self.promised is None else "no violation found"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: every field, and the verdict; what is not finite is None."""
        plain = {name: _finite(value) for name, value in asdict(self).items()}
        measures = {name: _finite(value) for name, value in self.measures.items()}
        return {**plain, "measures": measures, "assumptions": list(self.assumptions), "verdict": self.verdict}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_html(audits: Sequence[Audit], images: Mapping[str, Tensor] | None = None) -> str:
    """A fragment for a report: a table with bars, lower bound before promise, and pictures below it.

    images: title -> [C, H, W] or [n, C, H, W] in [0, 1], such as originals and reconstructions.
    """
    top = max((x for a in audits for x in (a.lower_bound, a.promised) if x and math.isfinite(x)), default=1.0)
    rows = "".join(_row(each, top) for each in audits)
    heads = "".join(
        f"<th>{title}</th>" for title in ("audit", "at least", "", "promised", "verdict", "measured")
    )
    pictures = "".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{_encoded(image)}" '
        f'style="image-rendering:pixelated;height:96px"/><figcaption>{html.escape(title)}</figcaption></figure>'
        for title, image in (images or {}).items()
    )
    return f'<table class="audits"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{pictures}'


def _row(audit: Audit, top: float) -> str:
    measured = ", ".join(f"{name} {value:.3g}" for name, value in audit.measures.items())
    found, promised = (_number(value) for value in (audit.lower_bound, audit.promised))
    cells = (f"{audit.kind} ({audit.unit})", found, None, promised, audit.verdict, measured)
    title = html.escape("; ".join(audit.assumptions), quote=True)
    inner = "".join(f"<td>{_bar(audit, top) if cell is None else html.escape(cell)}</td>" for cell in cells)
    return f'<tr title="{title}">{inner}</tr>'


def _bar(audit: Audit, top: float) -> str:
    """The lower bound as a bar and the promise as a line, on one scale of epsilon."""
    length, mark = (WIDTH * min(x or 0.0, top) / top for x in (audit.lower_bound, audit.promised))
    colour = "#c0392b" if audit.violated else "#2e86ab"
    line = (
        ""
        if audit.promised is None
        else f'<line x1="{mark:.1f}" x2="{mark:.1f}" y2="14" stroke="currentColor" stroke-width="2"/>'
    )
    return (
        f'<svg width="{WIDTH + 2}" height="14" role="img" aria-label="epsilon">'
        f'<rect y="3" width="{length:.1f}" height="8" fill="{colour}"/>{line}</svg>'
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _encoded(image: Tensor) -> str:
    return base64.b64encode(png(image)).decode()
