"""The laws with clients trained in blocks: near the loop, and the same bits after any crash."""

import re

import pytest
import torch
from torch import nn

from coterie.core import ConfigError, Interrupted, native, trees
from coterie.experiment import assemble, run
from coterie.storage import Checkpoints, RunFolder
from coterie.trainers.programs import Program

BLOCKS = {"trainer": "vectorised", "block": 4}
SOFTMAX = {"model": {"kind": "softmax"}}
KINDS = ["synchronous", "scaffold", "buffered", "asynchronous", "hierarchical", "gossip", "stragglers"]


def parameters(folder):
    """The final state's parameters as one vector."""
    _, tree, _ = Checkpoints(folder / "checkpoints").latest()
    leaves = trees.named_leaves(tree.get("state", tree)["model"]["params"])
    return torch.cat([leaf.double().flatten() for _, leaf in leaves])


def start(config):
    parts = assemble(config)
    return torch.cat([leaf.double().flatten() for _, leaf in trees.named_leaves(parts.initial["params"])])


def rounds(config, count):
    return {**config.schedule, "rounds": count}


@pytest.mark.parametrize("kind", ["synchronous", "scaffold", "gossip", "stragglers", "batchnorm"])
def test_a_round_ends_within_1e_5_of_the_loops(kind, experiment, tmp_path, unreported):
    """Of the change that the round made, not only of the state."""
    config = experiment(kind)
    ends = []
    for trainer in ("loop", "vectorised"):
        backend = {"trainer": trainer, **({"block": 4} if trainer == "vectorised" else {})}
        made = run(experiment(kind, schedule=rounds(config, 1), backend=backend), out=tmp_path / trainer)
        ends.append(parameters(made.folder))
    moved = (ends[0] - start(config)).norm()
    assert moved > 0
    assert (ends[1] - ends[0]).norm() <= 1e-5 * ends[0].norm()
    assert (ends[1] - ends[0]).norm() <= 1e-4 * moved


def test_many_rounds_train_as_well(experiment, tmp_path, unreported):
    config = experiment("synchronous")
    schedule = rounds(config, 25)
    loop = run(experiment("synchronous", schedule=schedule), out=tmp_path / "loop")
    block = run(experiment("synchronous", schedule=schedule, backend=BLOCKS), out=tmp_path / "block")
    assert loop.final["accuracy"] > 0.8
    assert block.final["accuracy"] == pytest.approx(loop.final["accuracy"], abs=0.01)
    assert block.final["loss"] == pytest.approx(loop.final["loss"], rel=1e-3)


@pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
@pytest.mark.parametrize("kind", ["fedavg", "scaffold"])
def test_threads_change_no_bit_and_a_run_can_be_stopped_between_blocks(
    kind, experiment, tmp_path, unreported, monkeypatch
):
    threads, train = set(), Program.train

    def watched(self, *args):
        threads.add(native.threads())
        return train(self, *args)

    monkeypatch.setattr(Program, "train", watched)
    algorithm = {"kind": kind, "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 4}}
    configs = {
        n: experiment("synchronous", algorithm=algorithm, backend={**BLOCKS, "threads": n}) for n in (1, 2, 3)
    }
    digests = {n: run(config, out=tmp_path / str(n)).model_digest for n, config in configs.items()}
    assert len(set(digests.values())) == 1
    assert threads == {1, 2, 3}
    asked = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        run(configs[3], out=tmp_path / "stopped", stop=lambda: next(asked))
    assert run(configs[2], out=tmp_path / "stopped", resume=True).model_digest == digests[1]
    assert native.threads() == 1


def timeless_rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder.open(folder).rows()]


class Crash(BaseException):
    """The power goes."""


def crash_after(events):
    calls = iter(range(events))

    def watch(progress):
        if next(calls, None) is None:
            raise Crash

    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_crash_after_any_event(kind, experiment, tmp_path, unreported):
    config, calls = experiment(kind, backend=BLOCKS), []
    whole = run(config, out=tmp_path / "whole", watch=calls.append)
    rows = timeless_rows(whole.folder)
    points = (len(calls) // 4, 3 * len(calls) // 4)
    for point in points:
        out = tmp_path / f"at-{point}"
        with pytest.raises(Crash):
            run(config, out=out, watch=crash_after(point))
        resumed = run(config, out=out, resume=True)
        assert resumed.model_digest == whole.model_digest, point
        assert timeless_rows(out) == rows, point


@pytest.mark.parametrize("kind", ["buffered"])
def test_sparse_checkpoints(kind, experiment, tmp_path, unreported):
    settings = {"evaluate_clients": False, "checkpoint_every": 3, "keep_checkpoints": 1}
    config, calls = experiment(kind, run=settings, backend=BLOCKS), []
    whole = run(config, out=tmp_path / "whole", watch=calls.append)
    for point in (len(calls) // 2, len(calls) - 2):
        with pytest.raises(Crash):
            run(config, out=tmp_path / str(point), watch=crash_after(point))
        assert run(config, out=tmp_path / str(point), resume=True).model_digest == whole.model_digest


def noisy():
    """A network with draws of torch's own, and of the library's dropout."""
    return nn.Sequential(
        nn.Linear(64, 16), nn.Unflatten(1, (16, 1)), nn.Dropout1d(0.2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10)
    )  # fmt: skip


def test_a_crash_changes_no_draw(experiment, tmp_path, unreported):
    """Small batches, so that steps are recorded, in one run in another round than in the other."""
    local = {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 10}
    config = experiment(
        "synchronous", backend=BLOCKS, algorithm={"kind": "fedavg", "client": local},
        data={**experiment("synchronous").data, "partition": {"kind": "iid", "clients": 9}},
    )  # fmt: skip
    with_model = {"model": Flat(noisy())}
    calls = []
    whole = run(config, out=tmp_path / "whole", watch=calls.append, **with_model)
    for point in (len(calls) // 3, 2 * len(calls) // 3):
        with pytest.raises(Crash):
            run(config, out=tmp_path / str(point), watch=crash_after(point), **with_model)
        again = run(config, out=tmp_path / str(point), resume=True, **with_model)
        assert again.model_digest == whole.model_digest


class Flat(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


class Ranked(nn.Module):
    """Its rows depend on each other: each is seen against the batch's mean."""

    def __init__(self):
        super().__init__()
        self.linear, self.out = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        h = self.linear(x.flatten(1))
        return self.out(torch.tanh(h - h.mean(0)))


def unmeasured():
    return Flat(nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 10)))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Branching, "data-dependent control flow.*torch.where"),
        (Ranked, "rows"),
        (unmeasured, "BatchNorm1d.*momentum"),
    ],
)
def test_auto_falls_back_to_the_loop_and_says_why(build, says, experiment, tmp_path, unreported):
    torch.manual_seed(1)
    model = build()
    auto = assemble(experiment("synchronous", backend={"trainer": "auto"}), model=model)
    assert auto.trainer.name == "loop"
    assert auto.note.startswith("trainer: loop, because ")
    assert re.search(says, auto.note, re.DOTALL), auto.note
    with pytest.raises(ConfigError, match=r"^backend\.trainer = 'vectorised': ") as error:
        assemble(experiment("synchronous", backend={"trainer": "vectorised"}), model=model)
    assert 'trainer = "loop"' in error.value.hint
    looped = run(
        experiment("synchronous", schedule=rounds(experiment("synchronous"), 1)),
        out=tmp_path / "loop",
        model=model,
    )
    fallen = run(
        experiment("synchronous", schedule=rounds(experiment("synchronous"), 1), backend={"trainer": "auto"}),
        out=tmp_path / "auto", model=model,
    )  # fmt: skip
    assert fallen.model_digest == looped.model_digest


@pytest.mark.parametrize("kind", ["synchronous", "batchnorm", "scaffold"])
def test_auto_takes_blocks_where_it_can(kind, experiment):
    made = assemble(experiment(kind, backend={"trainer": "auto"}))
    assert made.trainer.name == "vectorised"
    assert made.note.startswith("trainer: vectorised (blocks of up to ")
