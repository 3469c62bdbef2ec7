"""Data that lies at sites: stand-ins at the server, the site's own rows at the site."""

import pytest
import torch

from coterie.core import ConfigError, DataError, derive
from coterie.data import DATASETS, Dataset, Examples, digits, natural, own, populate
from coterie.experiment import assemble, load, run

SITES = {
    "dataset": "sites",
    "name": "scans",
    "sites": ["north", "south"],
    "input_shape": [1, 8, 8],
    "classes": list("0123456789"),
    "partition": {"kind": "natural", "column": "site"},
}
CONFIG = {
    "name": "remote",
    "data": SITES,
    "model": {"kind": "mlp", "hidden": 8},
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.1}},
    "schedule": {"kind": "synchronous", "rounds": 1, "cohort": 2},
}


def test_the_server_knows_the_sites_and_no_rows():
    parts = assemble(load(CONFIG))
    assert tuple(parts.population.clients) == ("site=north", "site=south")
    assert len(parts.test[1]) == 0
    assert not parts.population.dataset.train.x.any()


def test_the_server_may_evaluate_on_data_of_its_own():
    config = load({**CONFIG, "data": {**SITES, "test": {"dataset": "digits"}}})
    parts = assemble(config)
    assert torch.equal(parts.test[0], digits().prepare(digits().test.x))


def test_a_site_trains_on_all_of_its_own_rows():
    wanted = assemble(load(CONFIG)).population.dataset
    mine = own(wanted, digits(), "north")
    parts = natural(mine.train, key=derive(0, "partition"), column="site")
    people = populate(mine, parts, holdout=0.1, key=derive(0, "holdout"))
    assert tuple(people.clients) == ("site=north",)
    assert sum(people.sizes("site=north")) == len(digits().train)


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (Dataset("x", Examples(torch.zeros(3, 64), torch.zeros(3).long()), None, tuple("0123456789"), torch.Tensor.float), "shape"),
        (Dataset("x", Examples(torch.zeros(3, 1, 8, 8), torch.zeros(3).long()), None, ("a", "b"), torch.Tensor.float), "classes"),
        (Dataset("x", Examples(torch.zeros(3, 1, 8, 8), torch.zeros(3)), None, None, torch.Tensor.float), "classes"),
    ],
)  # fmt: skip
def test_other_data_than_the_run_expects_is_refused(mine, said):
    wanted = assemble(load(CONFIG)).population.dataset
    with pytest.raises(DataError, match=said):
        own(wanted, mine, "north")


def test_bad_site_lists_and_baselines_are_refused():
    with pytest.raises(ConfigError, match="each site once"):
        DATASETS["sites"](name="x", sites=["a", "a"], input_shape=[2])
    with pytest.raises(ConfigError, match="no rows to train baselines on"):
        assemble(load({**CONFIG, "compare": ["centralised"]}))


def test_a_run_in_one_process_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train on"):
        run(CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
