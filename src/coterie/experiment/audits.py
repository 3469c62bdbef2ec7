"""Attack a finished run: what its model and its clients' first gradients give away, beside what it promised.

The attacks are `privacy.audits`; here they get the run's own model, data and promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from coterie.core import ConfigError, Tree, derive, rng, trees
from coterie.data import Dataset, spread
from coterie.experiment.assemble import Parts, assemble, load_dataset
from coterie.experiment.config import Config, load
from coterie.experiment.records import Progress
from coterie.experiment.run import run
from coterie.privacy.audits import (
    Audit,
    canaries,
    gradient_of,
    infer_label,
    inverting,
    label_counts,
    membership,
    one_run,
    to_html,
)
from coterie.privacy.audits.images import psnr, ssim
from coterie.storage import RunFolder, write_atomic

ROWS = 5000  # of members, and of others, that are scored at most
CLIENTS = 20  # whose gradients are read
GUESSED = 1e-5  # delta where nothing was promised
ADAPTED = "one row changes one client: epsilon is twice the clients', delta 1 + e^epsilon times"


def audit_run(
    folder: Path | str, *, data_dir: Path | None = None, confidence: float = 0.95
) -> tuple[list[Audit], dict[str, Tensor]]:
    """Audit a finished run of a classification, without training anything.

    Returns the audits (membership by loss; labels; for images, inversion of one row) and the pictures
    {title: [C, H, W]} of the last. Labels and inversion read unprotected gradients of the model before
    training: what a client without clipping and noise of its own shows its server. Raises ConfigError.
    """
    place, config = _finished(folder)
    parts = assemble(config, data_dir=data_dir)
    _classifies(parts)
    stored = load_file(place.path / "model.safetensors")
    model = {half: {name: stored[name] for name in parts.initial[half]} for half in parts.initial}
    promised, delta, notes = promise(place.result().get("privacy"), replaced=False)
    pooled = parts.population.pooled().train
    scores = [
        -_losses(parts, model, *_some(rows, config.seed)) for rows in (pooled, parts.test)
    ]  # members, others
    found = membership(*scores, promised=promised, delta=delta, confidence=confidence)
    taking_part = "rows of clients that never took part count as members"
    audits = [replace(found, assumptions=(*found.assumptions, taking_part, *notes))]
    last = _last_layer(parts.initial["params"], len(parts.population.dataset.classes or ()))
    if last is None:
        return audits, {}
    audits.append(_labels(parts, last))
    if parts.test[0].dim() != 4 or not parts.test[0].is_floating_point():
        return audits, {}
    inverted, pictures = _inverted(parts, last)
    return [*audits, inverted], pictures


def audit_canaries(
    source: Path | str,
    count: int,
    *,
    out: Path | None = None,
    data_dir: Path | None = None,
    confidence: float = 0.95,
    watch: Callable[[Progress], None] | None = None,
) -> Audit:
    """Train again with canaries and audit that run: `count` rows, half of which get a wrong label by coins.

    source: a run's folder or a config. A canary's score is by how much the wrong label has become likelier
    than the true one. Neighbours differ in the label of one row; the partition is taken as public. out: the
    new run's folder. Raises ConfigError.
    """
    path = Path(source)
    config = _finished(path)[1] if path.is_dir() else load(path)
    dataset = load_dataset(config, data_dir)
    key = derive(config.seed, "audit")
    chosen, false = _wrong(dataset, count, key)
    included = canaries.coins(count, derive(key, "coins"))
    truth = dataset.train.y[chosen]
    y = dataset.train.y.clone()
    y[chosen[included]] = false[included]
    marked = replace(dataset, train=replace(dataset.train, y=y))
    data = config.data if dataset.test is None else {**config.data, "holdout": 0.0}  # no canary held out
    config = replace(config, name=f"{config.name}-canaries", compare=[], data=data)
    result = run(config, out=out, data_dir=data_dir, dataset=marked, watch=watch)
    parts = assemble(config, data_dir=data_dir, dataset=marked)
    rows = dataset.prepare(dataset.train.x[chosen])
    scores = _losses(parts, result.model, rows, truth) - _losses(parts, result.model, rows, false)
    promised, delta, notes = promise(result.privacy, replaced=True)
    found = one_run(scores, included, promised=promised, delta=delta, confidence=confidence)
    return replace(found, assumptions=(*found.assumptions, *notes))


def write_html(path: Path, audits: Sequence[Audit], pictures: Mapping[str, Tensor]) -> None:
    """Write what was found as one self-contained page."""
    style = "body{font:15px system-ui}td,th{padding:.3em .8em;text-align:left}figure{display:inline-block}"
    page = f"<!doctype html><meta charset=utf-8><title>Audits</title><style>{style}</style>"
    write_atomic(path, (page + to_html(audits, pictures)).encode())


def promise(privacy: Any, *, replaced: bool) -> tuple[float | None, float, tuple[str, ...]]:
    """(epsilon, delta, notes) that result.json's privacy promises one row; (None, 1e-5, ()) where nothing is.

    replaced: for neighbours that differ in a row's content. A promise for adding or removing one row holds
    for that twice, with delta times 1 + e^epsilon; so does one for clients, each of whom holds many rows.
    """
    claims: Sequence[Mapping[str, Any]] = (privacy or {}).get("claims", ())
    for claim in claims:
        epsilon, delta = claim.get("epsilon"), claim.get("delta")
        if epsilon is None or delta is None:
            continue
        if claim.get("unit") == "example" and not replaced:
            return epsilon, delta, ()
        twice = (1 + math.exp(min(epsilon, 700.0))) * delta
        if twice < 1:
            return 2 * epsilon, twice, (ADAPTED,)
    return None, GUESSED, ()


def _finished(folder: Path | str) -> tuple[RunFolder, Config]:
    place = RunFolder.open(Path(folder))
    result = place.result()
    if not result or result["status"] != "finished":
        raise ConfigError(f"{folder}: this run has not finished", "resume it first: coterie run --resume")
    return place, load(place.path / "config.toml")


def _classifies(parts: Parts) -> None:
    if parts.problem.task != "classification" or parts.test[1].dim() != 1:
        raise ConfigError(
            f"{parts.config.name}: audits need one class label a row", "audit a run of a classification"
        )


def _some(rows: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    chosen = torch.from_numpy(rng(derive(seed, "audit", "rows")).permutation(len(rows[1]))[:ROWS])
    return rows[0][chosen], rows[1][chosen]


def _losses(parts: Parts, model: Tree, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row, in evaluation mode: float64 [n]."""
    problem, found = parts.problem, []
    with torch.no_grad():
        for x, y in zip(inputs.split(512), targets.split(512), strict=True):  # type: ignore[no-untyped-call]
            outputs = functional_call(problem.evaluation, (model["params"], model["buffers"]), (x,))
            found.append(problem.per_example(outputs, y).double())
    return torch.cat(found)


def _last_layer(params: Mapping[str, Tensor], classes: int) -> str | None:
    """The name of the bias of a last linear layer, if there is one."""
    names = [name for name, leaf in params.items() if leaf.shape == (classes,) and name.endswith("bias")]
    return names[-1] if names and names[-1] == list(params)[-1] else None


def _gradient(parts: Parts) -> Callable[[Tensor, Tensor], Mapping[str, Tensor]]:
    buffers, problem = parts.initial["buffers"], parts.problem

    def loss(params: Mapping[str, Any], inputs: Tensor, labels: Tensor) -> Tensor:
        outputs = functional_call(problem.evaluation, (dict(params), buffers), (inputs,))
        return problem.per_example(outputs, labels).mean()

    return gradient_of(loss, parts.initial["params"])


def _labels(parts: Parts, last: str) -> Audit:
    """How many of a client's labels its gradient tells, and how many a guess by everybody's shares would."""
    gradient, shares = _gradient(parts), torch.bincount(parts.test[1]).double()
    told, guessed = [], []
    for client in spread(parts.population.clients, CLIENTS):
        x, y = parts.population.data(client).train
        true = torch.bincount(y, minlength=len(parts.population.dataset.classes or ()))
        sent = gradient(x, y)[last].detach()
        share = torch.zeros(len(true), dtype=torch.float64)
        share[: len(shares)] = shares / shares.sum()
        told.append(1 - float((label_counts(sent, len(y)) - true).abs().sum()) / (2 * len(y)))
        guessed.append(1 - float((share * len(y) - true).abs().sum()) / (2 * len(y)))
    return Audit(
        kind="labels",
        unit="client",
        measures={"labels right": float(np.mean(told)), "right by guessing": float(np.mean(guessed))},
        assumptions=("one unprotected gradient of the model before training, over all of a client's rows",),
    )


def _inverted(parts: Parts, last: str) -> tuple[Audit, dict[str, Tensor]]:
    x, y = (each[:1] for each in parts.population.data(parts.population.clients[0]).train)
    sent = {name: leaf.detach() for name, leaf in _gradient(parts)(x, y).items()}
    low, high = trees.extent(x)
    label = torch.tensor([infer_label(sent[last])])
    key = derive(parts.config.seed, "audit", "inversion")
    found = inverting(_gradient(parts), sent, tuple(x.shape), label, key=key, box=(low, high))
    pictures = {
        title: ((image[0] - low) / max(high - low, 1e-12))
        for title, image in (("a client's row", x), ("rebuilt from its gradient", found.inputs))
    }
    measures = {"PSNR in dB": psnr(found.inputs, x, peak=high - low), "label right": float(label[0] == y[0])}
    if min(x.shape[-2:]) >= 11:
        measures["SSIM"] = ssim(*reversed(pictures.values()))
    return Audit(
        kind="inversion",
        measures=measures,
        assumptions=("one unprotected gradient of the model before training, over one row",),
    ), pictures


def _wrong(dataset: Dataset, count: int, key: Any) -> tuple[Tensor, Tensor]:
    """Rows for canaries [count], and a wrong label for each."""
    classes, n = len(dataset.classes or ()), len(dataset.train)
    if classes < 2 or dataset.train.y.dim() != 1 or dataset.remote:
        raise ConfigError(f"{dataset.name}: canaries need rows with one class label each, in one place")
    if not 20 <= count <= n // 2:
        raise ConfigError(
            f"canaries = {count}: must be in [20, {n // 2}], half of the rows",
            "1,000 tell an epsilon of up to about 5",
        )
    generator = rng(key)
    chosen = torch.from_numpy(generator.permutation(n)[:count])
    step = torch.from_numpy(generator.integers(1, classes, count))
    return chosen, (dataset.train.y[chosen] + step) % classes
