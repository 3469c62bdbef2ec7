"""Why replies were lost, in a few words that can be counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

KINDS = (
    (r"no reply after \S+ s", "late"),  # gather's deadline
    (r"\d+ versions old", "stale"),  # buffered's max_staleness
    (r"dropped out|offline|went offline|no reply", None),  # what backends.system and gossip say
)


def why(lost: Iterable[str]) -> dict[str, int]:
    """Count reasons such as "client-3: no reply after 5 s", sorted: {"dropped out": 1, "late": 2}.

    Besides what a simulated device says ("dropped out", "offline", "went offline") there are "late" (after
    the deadline), "stale" (older than max_staleness), "not finite" (dropped by on_nan) and "failed" (any
    error of the client's own).
    """
    return dict(sorted(Counter(map(kind, lost)).items()))


def kind(reason: str) -> str:
    """One reason in a word or two."""
    if re.match(r"client .*, version \d+: ", reason):  # what NonFinite says of an update
        return "not finite"
    said = reason.partition(": ")[2]
    for pattern, word in KINDS:
        if re.fullmatch(pattern, said):
            return word or said
    return "failed"
