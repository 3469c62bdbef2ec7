"""The worked examples of CONTRIBUTING.md are run for real, each against its oracle."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coterie as ct
from coterie.algorithms import ALGORITHMS
from coterie.data import DATASETS, PARTITIONS
from coterie.experiment import report
from coterie.schedules import SCHEDULES

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = {
    Path(path).stem: code for path, code in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT, re.DOTALL)
}
SMALL = {
    "name": "small",
    "data": {"dataset": "digits", "partition": {"kind": "dirichlet", "clients": 6, "alpha": 0.5}},
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.1, "batch_size": 64}},
    "schedule": {"kind": "synchronous", "rounds": 2, "cohort": 1.0},
}


@pytest.fixture(autouse=True)
def _unreported(monkeypatch):
    """Leave the report out, which only costs time here."""
    monkeypatch.setattr(report, "write", lambda folder: folder)


def load(name):
    module = ModuleType(f"contributing.{name}")
    sys.modules[module.__name__] = module  # where dataclasses look for the names of annotations
    exec(compile(BLOCKS[name], f"CONTRIBUTING.md: {name}", "exec"), vars(module))
    return module


def test_every_block_of_code_is_covered():
    assert set(BLOCKS) == {"fednova", "test_fednova", "wine", "striped", "everyone"}
    assert TEXT.count("```python") == len(BLOCKS)


def test_the_algorithm_is_as_short_as_its_heading_says():
    function = BLOCKS["fednova"].partition("def fednova")[2]
    assert len(function.strip().splitlines()) <= 20


FEDNOVA_TESTS = ["test_one_round_is_the_closed_form", "test_it_ends_at_its_own_fixed_point"]


@pytest.mark.parametrize("name", FEDNOVA_TESTS)
def test_the_algorithm_passes_its_test_and_fedavg_does_not(name, tmp_path, monkeypatch):
    test = load("test_fednova")
    assert {each for each in vars(test) if each.startswith("test_")} == set(FEDNOVA_TESTS)
    monkeypatch.setitem(ALGORITHMS, "fednova", load("fednova").fednova)
    getattr(test, name)(tmp_path / "right")
    monkeypatch.setitem(ALGORITHMS, "fednova", ct.fedavg)
    with pytest.raises(AssertionError):
        getattr(test, name)(tmp_path / "wrong")


def test_the_algorithm_runs_below_relays_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "fednova", load("fednova").fednova)
    config = {**SMALL, "algorithm": {**SMALL["algorithm"], "kind": "fednova"}}
    deep = {**config, "schedule": {**SMALL["schedule"], "kind": "hierarchical", "groups": 2}}
    flat = ct.run(config, out=tmp_path / "flat")
    assert ct.run(deep, out=tmp_path / "deep").model_digest == flat.model_digest


def test_the_data_set_trains_dealt_out_by_the_partition(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "wine", load("wine").wine)
    monkeypatch.setitem(PARTITIONS, "striped", load("striped").striped)
    config = {**SMALL, "data": {"dataset": "wine", "partition": {"kind": "striped", "clients": 5}}}
    assert ct.run(config, out=tmp_path / "run").final["accuracy"] > 0.8  # the commonest class alone: 0.4


@given(rows=st.integers(1, 200), data=st.data())
def test_the_partition_loses_and_doubles_nothing(rows, data):
    clients = data.draw(st.integers(1, rows))
    examples = ct.Examples(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64))
    parts = load("striped").striped(examples, key=ct.derive(0), clients=clients)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(rows))
    assert len(parts) == clients
    assert all(len(part) for part in parts.values())


def test_the_schedule_ends_with_the_bits_of_the_synchronous_one(tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "everyone", load("everyone").Everyone)
    for kind in ("fedavg", "scaffold"):
        config = {**SMALL, "algorithm": {**SMALL["algorithm"], "kind": kind}, "system": {"drop_out": 0.2}}
        reference = ct.run(config, out=tmp_path / kind / "reference")
        config = {**config, "schedule": {"kind": "everyone", "rounds": 2}}
        assert ct.run(config, out=tmp_path / kind / "everyone").model_digest == reference.model_digest
