"""Law 3 over a network: whoever is killed whenever, a synchronous run ends with the bits of one process."""

import pytest

from coterie import experiment
from deployment import SMALL, deployed

ALGORITHMS = {
    "fedavg": SMALL,
    "scaffold": {**SMALL, "algorithm": {**SMALL["algorithm"], "kind": "scaffold"}},
}


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    return {
        kind: experiment.run(config, out=tmp_path_factory.mktemp(kind) / "run").model_digest
        for kind, config in ALGORITHMS.items()
    }


def test_undisturbed(tmp_path, digests):
    with deployed(tmp_path) as federation:
        run = federation.submit(SMALL)
        assert federation.watch(run)["status"] == "finished"
        assert federation.result(run)["model_digest"] == digests["fedavg"]
    assert federation.orphans() == []


@pytest.mark.parametrize("who", ["server", "site-1", "everybody"])
def test_killed_after_a_round(tmp_path, digests, who):
    with deployed(tmp_path) as federation:

        def kill(round):
            if round == 2:
                names = [who] if who != "everybody" else ["server", *federation.names]
                for name in names:
                    federation.kill(name)
                federation.start(*names, ready=False)

        run = federation.submit(ALGORITHMS["scaffold"])
        assert federation.watch(run, kill)["status"] == "finished"
        assert federation.result(run)["model_digest"] == digests["scaffold"]
    assert federation.orphans() == []
