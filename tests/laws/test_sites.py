"""Law 6, nothing leaves a site but replies and losses; law 8, threads never share a module."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coterie.backends import Site
from coterie.core import Lost, Reply, Task, trees
from coterie.experiment import assemble, run
from coterie.storage import Memories
from coterie.trainers import Problem


@pytest.mark.parametrize("kind", ["synchronous", "scaffold", "batchnorm", "asynchronous", "gossip"])
def test_what_leaves_a_site_is_an_update_a_weight_and_a_few_numbers(
    kind, experiment, tmp_path, unreported, monkeypatch
):
    """Tensors of the model's own shapes, not one row of data among them, and metrics that are plain floats."""
    left = []

    def spied(self, task, answer=Site.__call__):
        left.append(answer(self, task))
        return left[-1]

    monkeypatch.setattr(Site, "__call__", spied)
    config = experiment(kind)
    run(config, out=tmp_path / "run")
    parts = assemble(config)
    model = {tuple(leaf.shape) for leaf in trees.leaves(parts.initial)}
    assert left
    for answer in left:
        assert type(answer) in (Reply, Lost)
        if isinstance(answer, Lost):
            continue
        assert {tuple(leaf.shape) for leaf in trees.leaves(answer.up)} <= model
        assert all(type(value) is float for value in answer.metrics.values())
        assert set(answer.metrics) <= {"loss", "accuracy"}
        data = parts.population.data(answer.task.client)
        storages = {leaf.untyped_storage().data_ptr() for leaf in trees.leaves(answer.up)}
        assert storages.isdisjoint(t.untyped_storage().data_ptr() for t in (*data.train, *data.test))


def test_an_error_at_a_site_leaves_as_a_reason_and_not_as_an_object():
    def fit(algorithm, task, memory, data):
        raise OSError("patient 17 is missing")

    site = Site(None, SimpleNamespace(fit=fit, width=1), None, lambda client: None, Memories())
    answer = site(Task(0, "a", 0, 0, None))
    assert type(answer) is Lost
    assert answer.reason == "OSError: patient 17 is missing"


def test_two_threads_cannot_use_one_problem():
    """Silent corruption otherwise: functional_call swaps the module's tensors while it runs."""
    inside, leave = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            inside.set()
            leave.wait(20)
            return super().forward(x)

    problem = Problem(Slow(2, 2))
    model, batch = problem.model(), (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    thread = threading.Thread(target=lambda: problem.loss(model["params"], model["buffers"], batch))
    thread.start()
    try:
        assert inside.wait(20)
        with pytest.raises(RuntimeError, match="two threads use one Problem"):
            problem.loss(model["params"], model["buffers"], batch)
        with pytest.raises(RuntimeError, match="two threads use one Problem"):
            problem.measure(model, *batch)
    finally:
        leave.set()
        thread.join()
    problem.loss(model["params"], model["buffers"], batch)  # free again
