"""Differential privacy: mechanisms and their noise, accounting, matrix factorisation, audits, analytics.

Knows `core` alone: what a schedule or a config is, `experiment` tells it. Read `accounting` first.
"""

from __future__ import annotations

__all__: list[str] = []
