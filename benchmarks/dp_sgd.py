"""What per-example clipping costs a step of the vectorised trainer, against plain training and Opacus.

    python benchmarks/dp_sgd.py [--model cnn] [--clients 4] [--rounds 5]

Every case trains the same clients on shuffled batches of 32 MNIST-shaped examples, one thread; only "poisson"
draws its batches as the accounting needs, and pays for their padded places. Cases are interleaved and the
least processor time taken, because machines are shared. Plain training is timed by programs in C and by
recorded graphs, which is how private steps run. Opacus is left out where it is not installed.
"""

import argparse
import time
import warnings

import torch
from torch import nn

from coterie import models
from coterie.algorithms import Local, fedavg
from coterie.core import Task
from coterie.data import ClientData
from coterie.privacy.examples import dp_sgd
from coterie.trainers import Problem, Vectorised

try:
    import opacus
except ModuleNotFoundError:
    opacus = None

warnings.simplefilter("ignore")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="cnn", choices=("cnn", "mcmahan_cnn", "mlp"))
parser.add_argument("--clients", type=int, default=4)
parser.add_argument("--rounds", type=int, default=5)
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)
BATCH, STEPS = 32, 5
network = models.MODELS[options.model](input_shape=(1, 28, 28), outputs=10)
problem = Problem(network)
clients = []
for _ in range(options.clients):
    rows = torch.randn(BATCH * STEPS, 1, 28, 28), torch.randint(0, 10, (BATCH * STEPS,))
    clients.append(ClientData(rows, rows))


class Graphs(Vectorised):
    """Without the programs in C."""

    def _by_program(self, *_):
        return None


def trained(algorithm, trainer):
    down = algorithm.broadcast(algorithm.init(problem.model()))
    made = trainer(problem, 7, block=options.clients)

    def case(number):
        config = algorithm.local(0)
        tasks = [Task(each, str(each), 0, number, down, config=config) for each in range(options.clients)]
        made.fit_block(algorithm, tasks, [None] * options.clients, clients)

    return case


def opacus_steps():
    made = []
    for data in clients:
        module = models.MODELS[options.model](input_shape=(1, 28, 28), outputs=10)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data.train), batch_size=BATCH)
        made.append(
            opacus.PrivacyEngine().make_private(
                module=module,
                optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
            )
        )

    def case(_):
        for module, optimizer, loader in made:
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x), y).backward()
                optimizer.step()

    return case


plain = fedavg(Local(lr=0.1, batch_size=BATCH), weighting="uniform")
simulated = {"norm": 1.0, "sampling": "shuffled", "protected": False}
cases = {
    "plain, programs": trained(plain, Vectorised),
    "plain, graphs": trained(plain, Graphs),
    "clipped": trained(dp_sgd(plain, multiplier=0, **simulated), Vectorised),
    "clipped, float noise": trained(dp_sgd(plain, multiplier=1, **simulated), Vectorised),
    "the same, poisson": trained(dp_sgd(plain, multiplier=1, norm=1.0, protected=False), Vectorised),
}
if opacus:
    cases["opacus"] = opacus_steps()
else:
    print("opacus is not installed: left out")

for case in cases.values():
    case(0)
least = dict.fromkeys(cases, float("inf"))
for number in range(1, options.rounds + 1):
    for name, case in cases.items():
        start = time.process_time()
        case(number)
        least[name] = min(least[name], time.process_time() - start)
print(f"{options.model}, {problem.parameters():,} parameters, {options.clients} clients")
for name, seconds in least.items():
    against = seconds / least["plain, graphs"], seconds / least["plain, programs"]
    milliseconds = 1000 * seconds / STEPS / options.clients
    print(
        f"{name:24} {milliseconds:8.2f} ms a step  {against[0]:6.2f} x graphs  {against[1]:6.2f} x programs"
    )
