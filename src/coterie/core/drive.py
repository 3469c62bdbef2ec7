"""drive(): the small loop that joins a plan to a backend. It knows neither algorithms nor transport."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from coterie.core.gather import awaits
from coterie.core.types import Backend, Commit, Event, Plan

T = TypeVar("T")


async def drive(
    plan: Plan[T],
    backend: Backend,
    *,
    on_commit: Callable[[Commit], None] = lambda commit: None,
    on_event: Callable[[float, Event], None] = lambda now, event: None,
) -> T:
    """Run the plan to its end and return what it returns.

    on_commit is called before the actions that follow the commit are sent, so what it writes is durable
    by then. on_event sees every event before the plan does (a write-ahead log; raise to stop the run).
    """
    try:
        actions = next(plan)
        while True:
            for action in actions:
                if isinstance(action, Commit):
                    on_commit(action)
            backend.send([action for action in actions if not isinstance(action, Commit)])
            if awaits(actions):
                now, event = await backend.event()
                on_event(now, event)
                actions = plan.send(event)
                del event  # its tensors, while the next one is waited for
            else:
                actions = plan.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        plan.close()


def run_sync(make: Callable[[], T]) -> T:
    """Call `make` where it may start an event loop: here, or in a thread when one runs here (notebooks)."""
    if not _loop_runs():
        return make()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(make())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="coterie")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
