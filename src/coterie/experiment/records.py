"""What a run tells while it goes on, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A moment of a run. Bytes and samples are totals so far; done and total count clients of this round."""

    folder: Path
    round: int
    rounds: int
    loss: float | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    asked: int = 0
    answered: int = 0
    lost: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    eta: float | None = None  # seconds
    note: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with; `to_json()` is result.json."""

    folder: Path
    name: str
    seed: int
    task: str
    rounds: int
    status: str  # "finished", "budget spent", "failed", "interrupted"
    final: Mapping[str, float]
    clients: Mapping[str, float] | None
    baselines: Mapping[str, Any]
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    model_digest: str
    trainer: Mapping[str, Any] = field(default_factory=dict)  # kind, and what batches each layer
    privacy: Mapping[str, Any] | None = None  # {"claims": [...], "ledger": {...}, "withheld": ...}
    error: str | None = None
    model: Any = field(default=None, repr=False)  # {"params", "buffers"}: tensors

    def to_json(self) -> dict[str, Any]:
        """The object in result.json."""
        names = (
            "name",
            "seed",
            "rounds",
            "status",
            "task",
            "final",
            "clients",
            "baselines",
            "bytes",
            "seconds",
            "trainer",
        )
        made = {name: getattr(self, name) for name in (*names, "privacy", "model_digest")}
        return {**made, "error": self.error} if self.error else made
