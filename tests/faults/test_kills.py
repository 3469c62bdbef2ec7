"""Law 3 over a network: whoever is killed whenever, a synchronous run ends with the bits of one process."""

from coterie import experiment
from deployment import SMALL, deployed

SCAFFOLD = {
    **SMALL,
    "algorithm": {**SMALL["algorithm"], "kind": "scaffold"},
    "schedule": {**SMALL["schedule"], "rounds": 20},
}


def test_whoever_is_killed_the_bits_are_the_same(tmp_path):
    here = experiment.run(SCAFFOLD, out=tmp_path / "here").model_digest
    with deployed(tmp_path / "there") as federation:
        victims = {3: ["server"], 8: ["site-1"], 13: ["server", *federation.names]}

        def kill(round):
            due = [at for at in victims if at <= round][:1]
            names = victims.pop(due[0]) if due else []
            for name in names:
                federation.kill(name)
            if names:
                federation.start(*names, ready=False)

        run = federation.submit(SCAFFOLD)
        assert federation.watch(run, kill) == {"status": "finished", "error": ""}
        assert victims == {}
        assert federation.result(run)["model_digest"] == here
    assert federation.orphans() == []
