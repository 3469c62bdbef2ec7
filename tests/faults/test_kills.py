"""Law 3 over a network: whoever is killed whenever, a synchronous run ends with the bits of one process."""

from deployment import LONG, deployed, undisturbed
from faults.soak import soak


def test_whoever_is_killed_the_bits_are_the_same(tmp_path):
    with deployed(tmp_path) as federation:
        victims = {3: ["server"], 8: ["site-1"], 13: ["server", *federation.names]}

        def kill(round):
            due = [at for at in victims if at <= round][:1]
            names = victims.pop(due[0]) if due else []
            for name in names:
                federation.kill(name)
            if names:
                federation.start(*names, ready=False)

        run = federation.submit(LONG)
        assert federation.watch(run, kill) == {"status": "finished", "error": ""}
        assert victims == {}
        assert federation.result(run)["model_digest"] == undisturbed(LONG)
    assert federation.orphans() == []


def test_random_kills_at_random_moments(tmp_path):
    """`python tests/faults/soak.py --kills 100` for longer ones."""
    assert soak(tmp_path, kills=6, seed=1, longest=2.0) >= 1
