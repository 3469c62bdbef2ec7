"""Law 3 at each step of the protocol: whoever is killed there and started again, the bits are the same."""

import os
import threading

from coterie.experiment.quickstart import PATIENCE
from deployment import LONG, deployed, undisturbed

# The first three of each run always, all of them with COTERIE_STEPS=all.
STEPS = {
    "server": [
        ("heard", "answered"), ("sent", "accepted"), ("sent", "assign"),
        ("heard", "opened"), ("sent", "welcome"), ("sent", "run-opened"), ("heard", "hello"),
        ("heard", "want"), ("heard", "offer"), ("sent", "have"), ("sent", "taken"), ("heard", "beat"),
        ("sent", "run-closed"),
    ],
    "site-1": [
        ("heard", "run-opened"), ("heard", "assign"), ("heard", "accepted"),
        ("sent", "opened"), ("sent", "want"), ("sent", "hello"), ("heard", "run-closed"),
    ],
    "site-2": [
        ("sent", "answered"), ("heard", "have"), ("heard", "taken"),
        ("heard", "assign"), ("heard", "welcome"), ("sent", "offer"), ("sent", "beat"),
    ],
}  # fmt: skip
if os.environ.get("COTERIE_STEPS") != "all":
    STEPS = {name: steps[:3] for name, steps in STEPS.items()}


def test_kills_at_each_step(tmp_path):
    run, met = "", {name: [] for name in STEPS}
    with deployed(tmp_path, start=False) as federation:

        def fault(name):
            step = STEPS[name][len(met[name])] if len(met[name]) < len(STEPS[name]) else None
            return {"at": [*step, 1], "do": ["kill"]} if step else None

        def chain(name):
            while len(met[name]) < len(STEPS[name]):
                process = federation.processes[name]
                assert process.process.wait(2 * PATIENCE) == -9, process.log.read_text()[-3000:]
                met[name].append(STEPS[name][len(met[name])])
                process.end()
                federation.start(name, ready=False, fault=fault(name))

        for name in STEPS:
            federation.start(name, fault=fault(name))
        run = federation.submit(LONG)
        chains = [threading.Thread(target=chain, args=(name,), daemon=True) for name in STEPS]
        for each in chains:
            each.start()
        assert federation.watch(run) == {"status": "finished", "error": ""}
        for each in chains:
            each.join(PATIENCE)
        assert met == STEPS
        assert federation.result(run)["model_digest"] == undisturbed(LONG)
    assert federation.orphans() == []
