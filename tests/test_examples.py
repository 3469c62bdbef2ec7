"""Every example is a valid experiment; those that need no files run."""

from pathlib import Path

import pytest

import coterie as ct
from coterie.experiment import assemble
from coterie.experiment.code import gathered
from coterie.security import Policy, members

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


def test_code_that_travels(tmp_path):
    folder = EXAMPLES[0].parent / "travelling"
    config = ct.load(folder / "experiment.toml", ["schedule.rounds=2"])
    assert [each.filename for each in members(gathered(config))] == ["model.py", "train.py"]
    assert ct.run(config, out=tmp_path / "run").status == "finished"
    assert Policy.load(folder / "policy.toml").code == "signed"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, request, tmp_path):
    config = ct.load(path)
    if config.data["dataset"] == "digits":
        short = ct.load(path, ["schedule.rounds=2", "compare=[]"])
        assert ct.run(short, out=tmp_path / "run").status == "finished"
    else:
        parts = assemble(config, data_dir=request.getfixturevalue("real_data"))
        assert parts.population.clients
