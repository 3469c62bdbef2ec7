"""The errors, where the rooms look for them. They stand outside, for what must not wait for torch."""

from coterie.errors import (
    ConfigError,
    CoterieError,
    DataError,
    Fenced,
    Interrupted,
    NonFinite,
    OutOfRange,
    QuorumLost,
    RunError,
)

__all__ = [
    "ConfigError", "CoterieError", "DataError", "Fenced", "Interrupted", "NonFinite", "OutOfRange",
    "QuorumLost", "RunError",
]  # fmt: skip
