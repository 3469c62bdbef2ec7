"""Kill random processes at random moments: `python tests/faults/soak.py --kills 100 --seed 1`.

However often, and in the middle of whatever, each run must end with the bits of one undisturbed process, and
nothing may be left of those that were killed.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from deployment import LONG, deployed, undisturbed  # noqa: E402

RUN = {**LONG, "schedule": {**LONG["schedule"], "rounds": 60}}


def soak(home, kills, seed, longest=4.0):
    """Kill so often, `longest` seconds apart at most; return how many runs were needed."""
    draw, done, runs = random.Random(seed), 0, 0
    with deployed(home) as federation:
        everybody = ["server", *federation.names]
        while done < kills:
            run, runs, seen = federation.submit(RUN), runs + 1, []
            watching = threading.Thread(target=lambda run=run, seen=seen: seen.append(federation.watch(run)))
            watching.start()
            while watching.is_alive():
                watching.join(draw.uniform(0.0, longest))
                if watching.is_alive() and done < kills:
                    victims = draw.sample(everybody, draw.choice([1, 1, 1, 2, 3]))
                    for name in victims:
                        federation.kill(name)
                        done += 1
                    federation.start(*victims, ready=False)
            assert seen == [{"status": "finished", "error": ""}], seen
            assert federation.result(run)["model_digest"] == undisturbed(RUN)
            assert federation.orphans() == []
    assert federation.orphans() == []
    return runs


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--longest", type=float, default=4.0, help="seconds between kills")
    told = options.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = soak(folder, told.kills, told.seed, told.longest)
    print(f"{told.kills} kills, {runs} runs: the same bits, no orphan; {time.monotonic() - start:.0f} s")
