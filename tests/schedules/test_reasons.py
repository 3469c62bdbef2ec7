"""Why replies are lost: what gathering and devices really say is counted under its name."""

import math

import pytest
import torch

from coterie.aggregators import mean
from coterie.core import Lost, Reply, Task
from coterie.core.gather import Gathered, accept, empty, gather
from coterie.core.types import Tick
from coterie.schedules.reasons import why


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("client-3: no reply after 5 s", "late"),
        ("client-3: no reply after 0.25 s", "late"),
        ("client-3: no reply after 1e-05 s", "late"),
        ("client-7: dropped out", "dropped out"),
        ("client-7: offline", "offline"),
        ("client-7: went offline", "went offline"),
        ("client-7: no reply", "no reply"),
        ("client-7: 12 versions old", "stale"),
        ("client 7, version 3: delta/w holds NaN or infinity", "not finite"),
        ("client-7: ValueError: offline", "failed"),
        ("client-7: RuntimeError: no reply after 5 s", "failed"),
        ("client-7: ", "failed"),
        ("", "failed"),
    ],
)
def test_kinds(reason, kind):
    assert why([reason]) == {kind: 1}


def test_counts_are_sorted_and_complete():
    lost = ("b: dropped out", "a: no reply after 5 s", "c: no reply after 5 s", "d: OSError: full")
    counts = why(lost)
    assert counts == {"dropped out": 1, "failed": 1, "late": 2}
    assert list(counts) == sorted(counts)
    assert why(()) == {}


def test_what_gathering_says_is_understood():
    tasks = [Task(i, f"client-{i}", 0, 0, {}) for i in range(3)]
    plan = gather(mean(), tasks, timer=9, deadline=2.5, on_nan="drop")
    next(plan)
    plan.send(Lost(tasks[0], "dropped out"))
    plan.send(Reply(tasks[1], {"w": torch.tensor([math.nan])}, 1.0))
    plan.send(Tick(9, 2.5))
    with pytest.raises(StopIteration) as end:
        next(plan)
    assert why(end.value.value.fold.lost) == {"dropped out": 1, "late": 1, "not finite": 1}
    got = Gathered(empty(mean()))
    accept(got, mean(), Reply(tasks[0], {"w": torch.ones(1)}, math.inf), "drop")
    assert why(got.fold.lost) == {"not finite": 1}
