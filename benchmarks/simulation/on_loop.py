"""A plain PyTorch loop: nn.Module and torch.optim.SGD, in as many processes as cores, one thread each.

    python on_loop.py WORK '{"processes": 2}'

The processes live across rounds; weights and sums are shared memory, so a round sends only a round number.
"""

from __future__ import annotations

import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import work
from gate import Gate
from torch import Tensor, multiprocessing
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def serve(folder: Path, places: range, weights: Tensor, total: Tensor, words: Connection) -> None:
    """One process: train the clients at these places of each cohort; sum their weights in `total`."""
    torch.set_num_threads(1)
    given = work.read(folder)
    module = given.module()
    params = list(module.parameters())
    starts = [
        view.view_as(each)
        for view, each in zip(weights.split([p.numel() for p in params]), params, strict=True)
    ]
    sums = [
        view.view_as(each)
        for view, each in zip(total.split([p.numel() for p in params]), params, strict=True)
    ]
    optimizer = torch.optim.SGD(params, lr=given.lr)
    words.send("ready")
    while True:
        try:
            round = words.recv()
        except EOFError:
            return
        total.zero_()
        for place in places:
            with torch.no_grad():
                torch._foreach_copy_(params, starts)
            x, y = given.examples(round, place)
            work.epoch(module, optimizer, x, y)
            with torch.no_grad():
                torch._foreach_add_(sums, params, alpha=float(len(y)))
        words.send(len(places) * work.SAMPLES)


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    given = work.read(folder)
    gate = Gate(given.allotments)
    torch.set_num_threads(1)
    module, count = given.module(), options["processes"]
    weights = parameters_to_vector(module.parameters()).detach().clone().share_memory_()
    context = multiprocessing.get_context("spawn")
    workers = []
    for index in range(count):
        total = torch.zeros_like(weights).share_memory_()
        here, there = context.Pipe()
        places = range(index, work.COHORT, count)
        context.Process(target=serve, args=(folder, places, weights, total, there), daemon=True).start()
        there.close()
        workers.append((here, total))
    for words, _ in workers:
        words.recv()
    gate.open()
    for round in range(sum(given.allotments)):
        for words, _ in workers:
            words.send(round)
        samples = sum(words.recv() for words, _ in workers)
        weights.copy_(torch.stack([total for _, total in workers]).sum(0) / samples)
        gate.tick()
    vector_to_parameters(weights, module.parameters())
    gate.tell(loss=given.test_loss(module))


if __name__ == "__main__":
    main()
