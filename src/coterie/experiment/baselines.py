"""What the federation is compared with: all data in one place, and every client alone.

Both start from the run's initial model and see as many samples as the federation's clients did in all;
alone, each client sees its share of them in proportion to its own data. The optimiser keeps its state for
the whole run. Evaluated on the same global test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from coterie.algorithms import fedavg
from coterie.core import Tree, derive, seeded
from coterie.data import spread
from coterie.experiment.assemble import Parts
from coterie.trainers import descend, rows_of

MOST_ALONE = 1000  # clients that are trained alone
POINTS = 50  # at most so many evaluations on a curve
Note = Callable[[str], None]


def centralised(parts: Parts, samples: int, rounds: int, note: Note) -> dict[str, Any]:
    """Train on the union of the clients' data. curve: by the federation's rounds at equal samples seen."""
    points = min(rounds, POINTS)
    curve: list[dict[str, float]] = []
    marks = iter([round(samples * (index + 1) / points) for index in range(points)])
    mark = next(marks)
    for model, seen in _train(parts, parts.population.pooled().train, samples, "centralised"):
        if seen >= mark:
            measured = _measure(parts, model, parts.test)
            curve.append({"round": rounds * (len(curve) + 1) / points, **measured})
            note(f"centralised baseline: {len(curve)} of {points}")
            mark = next((later for later in marks if later > seen), samples + 1)
    return {**{k: v for k, v in curve[-1].items() if k != "round"}, "samples": samples, "curve": curve}


def local_only(parts: Parts, samples: int, note: Note) -> dict[str, Any]:
    """Train every client alone, or 1,000 of more. accuracy, loss: means over them, on the global test set."""
    everybody = parts.population.clients
    clients = spread(everybody, MOST_ALONE)
    total = sum(parts.population.sizes(client)[0] for client in clients) * len(everybody) / len(clients)
    alone: list[dict[str, float]] = []
    own: dict[str, float] = {}
    for index, client in enumerate(clients):
        data = parts.population.data(client)
        budget = max(1, round(samples * len(data.train[1]) / total))
        model = parts.initial
        for model, _ in _train(parts, data.train, budget, client):  # noqa: B007  the last one is what counts
            pass
        alone.append(_measure(parts, model, parts.test))
        if len(data.test[1]):
            own[client] = _measure(parts, model, data.test).get("accuracy", float("nan"))
        note(f"local-only baseline: {index + 1} of {len(clients)} clients")
    result: dict[str, Any] = {
        "loss": _mean([each["loss"] for each in alone]),
        "samples": samples,
        "of": len(everybody),
    }
    if "accuracy" in alone[0]:
        accuracies = [each["accuracy"] for each in alone]
        result |= {"accuracy": _mean(accuracies), "accuracies": accuracies}
        if own:
            result |= {"own_accuracy": _mean(list(own.values())), "own_accuracies": own}
    return result


BASELINES: Mapping[str, Callable[[Parts, int, int, Note], dict[str, Any]]] = {
    "centralised": centralised,
    "local_only": lambda parts, samples, rounds, note: local_only(parts, samples, note),
}


def _train(parts: Parts, data: tuple[Tensor, Tensor], samples: int, who: str) -> Iterator[tuple[Tree, int]]:
    """Descend until `samples` examples have been seen; yield the model and the count after each step."""
    key = derive(parts.config.seed, "baseline", who)
    local, count = parts.local, len(data[1])
    work = fedavg(local).client_work
    config = local.config("samples")(0)
    params, carry = work.start({"model": parts.initial}, None, config)
    passes = {**config, "epochs": -(-samples // count), "steps": None}
    rows = rows_of(count, passes, derive(key, "batches"), least=parts.problem.least_rows)
    seen = 0
    with seeded(derive(key, "torch")):
        for step in descend(parts.problem, work, params, carry, data, rows, key):
            seen += step.examples
            yield {"params": step.params, "buffers": step.carry["buffers"]}, seen
            if seen >= samples:
                return


def _measure(parts: Parts, model: Tree, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    measured = parts.problem.measure(model, *data)
    return {name: value for name, value in measured.items() if name != "count"}


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
