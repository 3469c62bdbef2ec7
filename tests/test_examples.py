"""Every example is a valid experiment; those that need no files run."""

from pathlib import Path

import pytest

import coterie as ct
from coterie.experiment import assemble

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, request, tmp_path):
    config = ct.load(path)
    if config.data["dataset"] == "digits":
        short = ct.load(path, ["schedule.rounds=2", "compare=[]"])
        assert ct.run(short, out=tmp_path / "run").status == "finished"
    else:
        parts = assemble(config, data_dir=request.getfixturevalue("real_data"))
        assert parts.population.clients
