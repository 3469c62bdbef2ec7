"""Client-level privacy in whole runs: bits, claims, the budget, the ledger, and what is refused."""

import asyncio
import json
import math
import queue
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch

import coterie as ct
from coterie.core import Task, trees
from coterie.experiment import assemble, report
from coterie.experiment.assemble import algorithm_of
from coterie.experiment.client import Handed
from coterie.experiment.promise import refuse_uncalibrated
from coterie.privacy import added
from coterie.privacy.noise import insecure_source
from coterie.storage import Blobs

CLIP = {"kind": "clip", "norm": 1.0}
NOISE = {"kind": "noise", "at": "server", "multiplier": 1.0, "delta": 1e-3}
FLOAT = {**NOISE, "protected": False}
SMALL = {
    "name": "private",
    "seed": 3,
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 9}},
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "weighting": "uniform", "client": {"lr": 0.1, "batch_size": 40}},
    "schedule": {"kind": "synchronous", "rounds": 2, "cohort": 5},
    "backend": {"trainer": "loop"},
    "transforms": [CLIP, FLOAT],
}


@pytest.fixture(autouse=True)
def unreported(monkeypatch, request):
    if "report" not in request.keywords:
        monkeypatch.setattr(report, "write", lambda folder: folder)


@pytest.mark.parametrize("trainer", ["loop", "vectorised"])
def test_simulated_noise_ends_with_the_same_bits_on_workers(trainer, tmp_path):
    digests = [
        ct.run(
            {**SMALL, "backend": {"trainer": trainer, "workers": workers}}, out=tmp_path / str(workers)
        ).model_digest
        for workers in (1, 2)
    ]
    assert digests[0] == digests[1]


def test_protected_sums_have_the_same_bits_flat_on_workers_and_on_two_levels(tmp_path, monkeypatch):
    """The noise from a test's source: all else of a protected run is exact."""
    digests = []
    for place, more in enumerate(
        [
            {},
            {"backend": {"trainer": "loop", "workers": 2}},
            {"schedule": {**SMALL["schedule"], "kind": "hierarchical", "groups": 3}},
        ]
    ):
        source, real = insecure_source(1), added.noise.__globals__["discrete_gaussian"]
        with monkeypatch.context() as patch:
            patch.setattr(
                added, "discrete_gaussian", lambda shape, sigma, r=real, s=source: r(shape, sigma, s)
            )
            config = {**SMALL, "transforms": [CLIP, NOISE], **more}
            digests.append(ct.run(config, out=tmp_path / str(place)).model_digest)
    assert digests[0] == digests[1] == digests[2]


def test_the_result_says_what_is_claimed_and_withholds_the_rest(tmp_path):
    ct.run({**SMALL, "transforms": [CLIP, NOISE]}, out=tmp_path / "r")
    told = json.loads((tmp_path / "r/result.json").read_text())
    (claim,) = told["privacy"]["claims"]
    # the rounds are one Gaussian of multiplier 1 / sqrt(2), whose delta at epsilon is Balle and Wang's, 2018
    law, epsilon, mu = NormalDist(), claim["epsilon"], math.sqrt(2)
    delta = law.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * law.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-3, rel=1e-4)
    assert (claim["unit"], claim["delta"], claim["rounds"], claim["protected"]) == ("client", 1e-3, 2, True)
    assert claim["sampling"] == {"kind": "none", "rate": 1.0}
    assert told["clients"] is None
    assert "clients" not in json.loads((tmp_path / "r/clients.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert all("train_loss" not in row and row["samples"] == 0 for row in rows)
    page = report.render(tmp_path / "r")
    assert "What is protected" in page
    assert "not private" not in page


def test_simulated_noise_is_labelled_wherever_epsilon_is_shown(tmp_path):
    ct.run(SMALL, out=tmp_path / "r")
    (claim,) = json.loads((tmp_path / "r/result.json").read_text())["privacy"]["claims"]
    assert "simulated noise: not private" in claim["assumptions"]
    assert report.render(tmp_path / "r").count("imulated noise: not private") >= 2


def test_a_run_stops_before_its_budget_is_passed(tmp_path):
    spent = [assemble(ct.load({**SMALL, "schedule": {**SMALL["schedule"], "rounds": n}})) for n in (3, 4)]
    between = sum(each.promise.epsilon(n) for each, n in zip(spent, (3, 4), strict=True)) / 2
    told = {"kind": "noise", "at": "server", "multiplier": 1.0, "protected": False}
    chain = [CLIP, {**told, "budget": {"epsilon": between, "delta": 1e-3}}]
    long = {**SMALL["schedule"], "rounds": 6}
    result = ct.run({**SMALL, "schedule": long, "transforms": chain}, out=tmp_path / "r")
    assert (result.rounds, result.status) == (3, "budget spent")


def test_a_budget_is_met_by_the_calibrated_multiplier():
    told = {"kind": "noise", "at": "server", "budget": {"epsilon": 2.0, "delta": 1e-3}}
    made = assemble(ct.load({**SMALL, "transforms": [CLIP, told]})).promise
    assert made.epsilon(2) <= 2.0 < made.epsilon(2) * 1.01


def test_a_crash_costs_the_round_in_flight_and_another_ledger_is_refused(tmp_path):
    class Crash(BaseException):
        pass

    def crash(progress):
        if progress.round == 1:
            raise Crash

    config, out = {**SMALL, "transforms": [CLIP, NOISE]}, tmp_path / "r"
    with pytest.raises(Crash):
        ct.run(config, out=out, watch=crash)
    result = ct.run(config, out=out, resume=True)
    assert result.privacy["claims"][0]["rounds"] == 3
    ledger = json.loads((out / "privacy.json").read_text())
    (out / "privacy.json").write_text(json.dumps({**ledger, "multiplier": 9.0}))
    with pytest.raises(ct.ConfigError, match="privacy ledger"):
        ct.run(config, out=out, resume=True)


def test_a_run_that_has_lost_its_ledger_does_not_go_on(tmp_path):
    config, out = {**SMALL, "transforms": [CLIP, NOISE]}, tmp_path / "r"
    ct.run(config, out=out)
    (out / "privacy.json").unlink()
    with pytest.raises(ct.ConfigError, match="ledger is gone"):
        ct.run(config, out=out, resume=True)


QUORUM = {**SMALL["schedule"], "quorum": 5}
L1 = {"kind": "clip", "norm": 1.0, "order": 1}
WHOLE = {
    "client": ({"transforms": [CLIP, {**NOISE, "at": "client"}]}, "discrete gaussian"),
    "shares": ({"transforms": [CLIP, {**NOISE, "at": "shares", "least": 4}], "schedule": QUORUM}, "discrete gaussian"),
    "skellam": (
        {"transforms": [CLIP, {**NOISE, "at": "shares", "least": 4, "mechanism": "skellam"}], "schedule": QUORUM},
        "skellam",
    ),
    "adaptive": ({"transforms": [{"kind": "clip", "adaptive": {}}, NOISE]}, "discrete gaussian"),
    "laplace": ({"transforms": [L1, {**NOISE, "mechanism": "laplace"}]}, "discrete laplace"),
    "poisson": ({"transforms": [CLIP, NOISE], "schedule": {**SMALL["schedule"], "sampling": "poisson"}}, "discrete gaussian"),
}  # fmt: skip


@pytest.mark.parametrize("trainer", ["loop", "vectorised"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_noise_ends_a_run_with_what_it_claims(name, trainer, tmp_path):
    change, mechanism = WHOLE[name]
    result = ct.run({**SMALL, **change, "backend": {"trainer": trainer}}, out=tmp_path / "r")
    (claim,) = result.privacy["claims"]
    assert (result.status, claim["mechanism"]) == ("finished", mechanism)
    assert 0 < claim["epsilon"] < math.inf
    assert claim["sampling"]["kind"] == ("poisson" if name == "poisson" else "none")
    assert all(leaf.isfinite().all() for leaf in result.model["params"].values())


def test_poisson_sampling_spends_less_and_a_lost_round_is_credited_none():
    drawn = {**SMALL["schedule"], "cohort": 2, "sampling": "poisson"}
    both = [
        assemble(ct.load({**SMALL, "transforms": [CLIP, NOISE], "schedule": schedule})).promise
        for schedule in ({**SMALL["schedule"], "cohort": 2, "kind": "hierarchical"}, drawn)
    ]
    assert both[1].epsilon(2) < both[0].epsilon(2)
    lost = replace(both[1], lost=1)
    assert both[1].epsilon(3) < lost.epsilon(2) < both[0].epsilon(3)


@pytest.mark.parametrize("at", ["client", "shares"])
def test_no_site_leaves_its_noise_out_for_want_of_a_multiplier(at):
    told = {"kind": "noise", "at": at, "budget": {"epsilon": 50.0, "delta": 1e-3}}
    told |= {"least": 4} if at == "shares" else {}
    config = ct.load({**SMALL, "transforms": [CLIP, told], "schedule": QUORUM})
    with pytest.raises(ct.ConfigError, match="without its multiplier"):
        algorithm_of(config)
    found = assemble(config).promise
    with pytest.raises(ct.ConfigError) as caught:
        refuse_uncalibrated(config, found)
    assert f"{found.multiplier:.6g}" in caught.value.hint
    refuse_uncalibrated(assemble(config).config, found)  # with it, it may travel


BATCHNORM = {"kind": "cnn", "channels": [4], "hidden": 8, "norm": "batch"}
BUDGET = {"kind": "noise", "at": "server"}
REFUSED = [
    ({"transforms": [NOISE]}, "without a clip", "add"),
    ({"transforms": [NOISE, CLIP]}, "before the clip", "first"),
    ({"transforms": [CLIP, NOISE, CLIP]}, "after the noise", "last"),
    ({"transforms": [CLIP, {**NOISE, "delta": 0.2}]}, "with 9 clients", "tenth"),
    ({"transforms": [CLIP, {**BUDGET, "budget": {"epsilon": 0, "delta": 1e-3}}]}, "epsilon = 0", "usual"),
    ({"transforms": [CLIP, {**NOISE, "multiplier": -1.0}]}, "multiplier = -1", "usual"),
    ({"transforms": [CLIP, {**NOISE, "mechanism": "laplace"}]}, "in L1", "order = 1"),
    ({"transforms": [CLIP, {**NOISE, "at": "shares"}]}, "least", "least = 10"),
    ({"transforms": [CLIP, {**NOISE, "at": "shares", "least": 5}]}, "too little noise", "quorum"),
    (
        {
            "transforms": [CLIP, {**NOISE, "at": "shares", "least": 3}],
            "schedule": {**SMALL["schedule"], "sampling": "poisson", "quorum": 3},
        },
        "fewer clients than",
        "uniform",
    ),
    ({"transforms": [{"kind": "clip", "adaptive": {}}]}, "only noise protects", "noise transform"),
    ({"transforms": [{"kind": "clipp", "norm": 1.0}]}, "no such kind", "did you mean 'clip'"),
    ({"algorithm": {"kind": "fedavg"}}, "count for more", "uniform"),
    ({"model": BATCHNORM}, "buffers", "GroupNorm"),
    (
        {"algorithm": {**SMALL["algorithm"], "aggregator": {"kind": "krum", "byzantine": 1}}},
        "must see each update",
        "mean",
    ),
    ({"schedule": {"kind": "gossip", "rounds": 2}}, "one sum a round", "synchronous"),
    ({"schedule": {**SMALL["schedule"], "sampling": "weighted"}}, "how much data", "uniform"),
    ({"transforms": [CLIP, NOISE], "compare": ["centralised"]}, "without any noise", "protected = false"),
    ({"transforms": [CLIP, NOISE], "run": {"checkpoint_every": 2}}, "a second time", "at 1"),
]


@pytest.mark.parametrize(("change", "said", "way_out"), REFUSED, ids=lambda x: x if type(x) is str else "")
def test_refused(change, said, way_out):
    with pytest.raises(ct.ConfigError) as caught:
        assemble(ct.load({**SMALL, **change}))
    assert said in str(caught.value)
    assert way_out in " ".join(map(str, (caught.value, getattr(caught.value, "hint", ""))))


def test_a_training_script_sends_its_update_with_noise(tmp_path):
    """On the grid, and never the same integers twice, though the script changed nothing."""
    chain = [CLIP, {**NOISE, "at": "client"}]
    config = {**SMALL, "transforms": chain}
    made, blobs, heard = assemble(ct.load(config)), Blobs(tmp_path), []
    down = made.algorithm.broadcast(made.algorithm.init(made.initial))
    task = Task(0, made.population.clients[0], 0, 0, blobs.write(down).digest, config=made.algorithm.local(0))

    async def script():
        handed = Handed(
            queue.SimpleQueue(), SimpleNamespace(config=config, blobs=tmp_path), heard.append, print
        )
        for _ in range(2):
            handed.give([task])
            offered = handed.offer(task)
            handed.offered.get()
            offered.send(offered.params, 5.0, {"loss": 1.0})
            await asyncio.sleep(0)

    asyncio.run(script())
    ups = [trees.leaves(blobs.read(done.up.digest))[-1] for done in heard]
    assert all(leaf.dtype == torch.int64 and leaf.any() for leaf in ups)
    assert not torch.equal(*ups)
    assert all((done.weight, done.samples, done.metrics) == (1.0, 0, {}) for done in heard)
