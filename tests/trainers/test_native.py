"""The kernels in C against float64, how they get into recorded graphs, and what happens without a compiler."""

import logging
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coterie.algorithms import Local, fedavg, fedprox, scaffold, sgd
from coterie.backends import Site
from coterie.core import Task, derive, native, rng, trees
from coterie.data import ClientData
from coterie.storage import Memories
from coterie.trainers import Loop, Problem, Vectorised, ops, programs
from coterie.trainers.recurrent import gru_forward

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def normal(*shape, seed=0):
    return torch.from_numpy(rng(derive(3, "native", seed, *shape)).normal(size=shape)).float()


@needs_compiler
@pytest.mark.parametrize(
    ("clients", "rows", "inputs", "outputs"),
    [
        (1, 1, 1, 1),
        (2, 3, 5, 2),
        (3, 10, 784, 20),
        (2, 11, 33, 17),
        (2, 47, 16, 9),
        (2, 48, 600, 33),
        (1, 131, 8, 65),
    ],
)
def test_linear_layers(clients, rows, inputs, outputs):
    x, w, b, dy = (
        normal(clients, rows, inputs),
        normal(clients, outputs, inputs, seed=1) / inputs**0.5,
        normal(clients, outputs, seed=2),
        normal(clients, rows, outputs, seed=3) / outputs**0.5,
    )
    wide = x.double(), w.double(), b.double(), dy.double()
    expected = wide[0] @ wide[1].mT + wide[2].unsqueeze(1)
    torch.testing.assert_close(ops.linear_forward(x, w, b, False).double(), expected, **CLOSE)
    torch.testing.assert_close(ops.linear_forward(x, w, b, True).double(), expected.relu(), **CLOSE)
    no_bias = expected - wide[2].unsqueeze(1)
    torch.testing.assert_close(ops.linear_forward(x, w, None, False).double(), no_bias, **CLOSE)

    dx, dw, db = ops.linear_backward(dy, x, w, True, True, False)
    expected_dx, expected_dw = wide[3] @ wide[1], wide[3].mT @ wide[0]
    torch.testing.assert_close(dx.double(), expected_dx, **CLOSE)
    torch.testing.assert_close(dw.double(), expected_dw, rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(db.double(), wide[3].sum(1), **CLOSE)
    masked, _, none = ops.linear_backward(dy, x, w, True, False, True)
    torch.testing.assert_close(masked.double(), expected_dx * (x > 0), **CLOSE)
    assert none.numel() == 0

    for factor in (torch.tensor(-0.1), torch.linspace(-0.1, -0.3, clients).view(-1, 1, 1)):
        for needs_x in (True, False):
            held = w.clone()
            dx, same, _ = ops.linear_step_(dy, x, held, needs_x, True, False, factor)
            assert same is held
            torch.testing.assert_close(held.double(), wide[1] + factor.double() * expected_dw, **CLOSE)
            if needs_x:  # of the weights as they were
                torch.testing.assert_close(dx.double(), expected_dx, **CLOSE)


@needs_compiler
def test_what_is_not_a_number_stays_so():
    x, w = normal(2, 4, 20), normal(2, 3, 20, seed=1)
    x[0, 1, 7] = math.nan
    for relu in (False, True):
        bad = ops.linear_forward(x, w, None, relu).isnan()
        assert bad[0, 1].all()
        assert bad.sum() == 3
    losses, _ = ops.cross_entropy_forward(
        ops.linear_forward(x, w, None, False), torch.zeros(2, 4).long(), -100
    )
    assert losses.isnan().nonzero().tolist() == [[0, 1]]


@needs_compiler
@pytest.mark.parametrize("classes", [1, 2, 10, 16, 65])
def test_cross_entropy(classes):
    z, y = 5 * normal(3, 7, classes), torch.arange(21).view(3, 7) % classes
    z[0, 0], z[0, 1] = 1e4, -1e4  # all the same, far away
    z[0, 2, 0] = 200  # the others' probability is nothing
    y[1, 1] = -100
    wide = z.double().requires_grad_()
    expected = F.cross_entropy(wide.movedim(-1, 1), y, reduction="none")
    losses, p = ops.cross_entropy_forward(z, y, -100)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    dl = normal(3, 7, seed=1)
    expected.backward(dl.double())
    torch.testing.assert_close(
        ops.cross_entropy_backward(dl, p, y, -100).double(), wide.grad, rtol=1e-5, atol=1e-6
    )


@needs_compiler
@pytest.mark.parametrize("wrong", [10, -1])
def test_a_target_of_no_class_is_refused(wrong):
    y = torch.tensor([[1, wrong]])
    with pytest.raises(IndexError, match="1 targets are not among the 10 classes"):
        ops.cross_entropy_forward(normal(1, 2, 10), y, -100)


@needs_compiler
def test_a_kernel_is_not_given_a_tensor_with_gaps():
    with pytest.raises(ValueError, match=r"gather needs contiguous tensors, not \(4, 4\)"):
        native.call("gather", normal(4, 4).T, torch.arange(2), torch.empty(2, 4), 2, 16)


def network():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def trained(problem, algorithm, people):
    """Updates of the vectorised trainer and of the loop; and the trainer's stepper."""
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
    tasks = [Task(i, str(i), 0, 0, down, config=config) for i in range(len(people))]
    trainer, loop = Vectorised(problem, 1), Loop(problem, 1)
    ((block, _),) = trainer.fit_block(algorithm, tasks, [None] * len(people), people)
    alone = [loop.fit(algorithm, task, None, people[int(task.client)])[0].up for task in block.tasks]
    (stepper,) = trainer.steppers.values()
    return block.ups, trees.map_tree(lambda *leaves: torch.stack(leaves), *alone), stepper


def code_of(stepper):
    return "".join(graph.__self__.code for graph in stepper.graphs.values())


def people(sizes=(20, 13, 20), shape=(6,)):
    made = []
    for i, n in enumerate(sizes):
        rows = normal(n, *shape, seed=i), torch.arange(n) % 3
        made.append(ClientData(rows, rows))
    return made


ALGORITHMS = {
    "sgd": fedavg(Local(lr=0.1, batch_size=4)),
    "momentum": fedavg(Local(lr=0.1, batch_size=4, optimizer=lambda lr: sgd(lr, momentum=0.9))),
    "decay": fedavg(Local(lr=0.1, batch_size=4, optimizer=lambda lr: sgd(lr, weight_decay=0.1))),
    "prox": fedprox(Local(lr=0.1, batch_size=4), mu=0.1),
    "scaffold": scaffold(Local(lr=0.1, batch_size=4), population=3),
}


def same(ours, its):
    for a, b in trees.rows(ours, its):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_linear_layer_steps_on_the_spot_only_where_nothing_is_added_to_its_gradient(name, monkeypatch):
    monkeypatch.setattr("coterie.trainers.vectorised.program", lambda *_: None)  # graphs alone
    torch.manual_seed(5)
    ours, its, stepper = trained(Problem(network()), ALGORITHMS[name], people())
    same(ours, its)
    code = code_of(stepper)
    assert ("linear_step_(" in code) == (name == "sgd")
    assert "linear_forward(" in code
    assert "relu.default" not in code  # the layers do it
    assert "threshold_backward" not in code


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("build", "shape"), [(network, (6,)), (convolutional, (2, 10, 10))], ids=["dense", "conv"]
)
def test_programs(name, build, shape):
    torch.manual_seed(6)
    ours, its, stepper = trained(Problem(build()), ALGORITHMS[name], people(shape=shape))
    same(ours, its)
    (made,) = stepper.programs.values()
    assert made is not None
    assert not stepper.graphs


@needs_compiler
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)),
    ],
    ids=["norm", "dropout", "softplus"],
)
def test_what_no_program_can_do_is_left_to_graphs(build, request):
    torch.manual_seed(7)
    ours, its, stepper = trained(Problem(build()), ALGORITHMS["sgd"], people((20, 12, 20)))
    if "dropout" not in request.node.name:  # whose draws are not the loop's
        same(ours, its)
    assert list(stepper.programs.values()) == [None]
    assert stepper.graphs


@needs_compiler
def test_a_program_that_differs_from_its_graph_is_not_used(monkeypatch):
    monkeypatch.setitem(programs.RULES, torch.ops.aten.add.Tensor, programs.RULES[torch.ops.aten.sub.Tensor])
    ours, its, stepper = trained(Problem(network()), ALGORITHMS["prox"], people())
    same(ours, its)
    assert list(stepper.programs.values()) == [None]


@needs_compiler
def test_a_client_alone_in_a_program_and_among_others_makes_the_same_bits():
    problem, algorithm, all_of_them = Problem(network()), ALGORITHMS["sgd"], people((20, 13, 17))
    together, _, _ = trained(problem, algorithm, all_of_them)
    alone, _, _ = trained(problem, algorithm, all_of_them[:1])
    for a, b in trees.rows(together, alone):
        assert torch.equal(a[0], b[0])


@contextmanager
def threads(count):
    before = native.set_threads(count)
    try:
        yield
    finally:
        native.set_threads(before)


@needs_compiler
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("build", "shape"), [(network, (6,)), (convolutional, (2, 10, 10))], ids=["dense", "conv"]
)
def test_a_program_makes_the_same_bits_with_any_number_of_threads(name, build, shape):
    torch.manual_seed(6)
    problem, algorithm, made = Problem(build()), ALGORITHMS[name], []
    everybody, trainer = people((20, 13, 17, 12, 31, 20, 9), shape), Vectorised(problem, 1)
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
    tasks = [Task(i, str(i), 0, 0, down, config=config) for i in range(len(everybody))]
    for count in (1, 2, 3, 11):
        with threads(count):
            made += trainer.fit_block(algorithm, tasks, [None] * len(everybody), everybody)
    for first, *others in trees.rows(*((block.ups, block.metrics, after or ()) for block, after in made)):
        assert all(torch.equal(*map(torch.as_tensor, (first, other))) for other in others)


@needs_compiler
def test_whoever_fails_among_several_threads_is_lost_alone():
    problem, algorithm, all_of_them = Problem(network()), ALGORITHMS["sgd"], people((20, 13, 17, 20))
    all_of_them[2].train[1][5] = 3  # no class
    site = Site(algorithm, Vectorised(problem, 1), None, lambda client: all_of_them[int(client)], Memories())
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
    with threads(3):
        got = site.fold([Task(i, str(i), 0, 0, down, config=config) for i in range(4)], "stop")
    assert set(got.accepted) == {"0", "1", "3"}
    assert got.fold.lost == ("2: IndexError: 1 inputs or targets are not among the classes",)


@needs_compiler
def test_a_program_stops_at_a_target_of_no_class():
    bad = people()
    bad[1].train[1][5] = 3
    with pytest.raises(IndexError, match="inputs or targets are not among the"):
        trained(Problem(network()), ALGORITHMS["sgd"], bad)


def test_without_kernels_torch_does_the_work(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "coterie"):
            monkeypatch.setenv("COTERIE_NATIVE", "0")
            assert native.library() is None
            assert not caplog.records
            monkeypatch.delenv("COTERIE_NATIVE")
            native.library.cache_clear()
            monkeypatch.setenv("CC", "no-such-compiler")
            assert native.library() is None
            assert not caplog.records
            native.library.cache_clear()
            monkeypatch.setenv("CC", "false")  # a compiler that fails
            assert native.library() is None
        assert "no kernels in C, torch's operators instead" in caplog.text
        assert list((tmp_path / "coterie").iterdir()) == []  # nothing half-made
        assert not native.fits(torch.ones(1))
        ours, its, stepper = trained(Problem(network()), ALGORITHMS["sgd"], people((20, 20)))
        same(ours, its)
        assert list(stepper.programs.values()) == [None]
        assert "linear_forward(" not in code_of(stepper)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.linear_forward(normal(2, 3, 64), normal(2, 4, 3), None, False),
        lambda: ops.linear_forward(normal(2, 3, 5), normal(1, 4, 5), None, False),
        lambda: ops.linear_forward(normal(2, 3, 5), normal(2, 4, 5), normal(2, 3), False),
        lambda: ops.linear_backward(normal(2, 3, 4), normal(2, 3, 5), normal(2, 6, 5), True, True, False),
        lambda: ops.cross_entropy_forward(normal(2, 3, 5), torch.zeros(2, 4).long(), -100),
        lambda: ops.cross_entropy_forward(normal(2, 3, 5), torch.zeros(2, 3).int(), -100),
        lambda: ops.cross_entropy_backward(normal(2, 4), normal(2, 3, 5), torch.zeros(2, 3).long(), -100),
        lambda: ops.conv_pool_forward(
            normal(1, 1, 9, 9, 2), normal(1, 4, 3, 3, 3), None, [1, 1], [0, 0], [2, 2], [2, 2], True
        ),
        lambda: ops.conv_pool_backward(
            normal(1, 1, 2, 2, 4), torch.zeros(1, 1, 2, 2, 4).int(), normal(1, 1, 9, 9, 2),
            normal(1, 4, 3, 3, 2), True, True, [1, 1], [0, 0], [2, 2], [2, 2], True,
        ),
        lambda: gru_forward(
            normal(1, 3, 2, 8), normal(1, 2, 5), normal(1, 15, 7), normal(1, 15, 5), normal(1, 15), normal(1, 15)
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_before_a_kernel_trusts_them(call):
    with pytest.raises(RuntimeError, match=r"is needed|not torch\.int64"):
        call()
