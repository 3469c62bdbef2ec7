"""DP-SGD inside a client: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang 2016, arXiv:1607.00133.

    g <- ( sum over the batch of  clip(grad of one example, C)  +  N(0, (sigma C)^2) )  /  expected batch

What is protected is one example of a client, against everybody who sees the client's update: the server too.
The denominator is the expected batch, never the real one. An example whose gradient is not finite adds zero:
a refusal would tell the server about one example. Parameters that are not finite still reach the server,
as ever, for `on_nan`.

The per-example gradients are those of batches of one, by `torch.func.vmap` where the layers allow, so nothing
can mix examples. Where the vectorised trainer batches clients, and the model's layers allow, `ghosts` makes
the same sum without them; the trainer compares both before it uses what it has recorded.

Float noise is a function of the run's seed, for research. Protected noise is integers on integers from the
operating system's randomness. Both are operators of torch, run anew in each step of a recorded graph, with a
draw for each client: nothing is frozen into a graph or repeated by vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level as current_level
from torch.library import custom_op
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from coterie.core import trees
from coterie.core.errors import ConfigError, RunError
from coterie.core.seeds import STILL
from coterie.core.types import Algorithm, Batch, ClientWork, Params, Tree
from coterie.privacy.ghosts import clip_factors, ghost_sum
from coterie.privacy.noise import discrete_gaussian

FINE = (
    2.0**10
)  # steps of the grid in norm / sqrt(d): truncation changes a gradient by less than 1 / 1024 of norm
AT_ONCE = 2**24  # numbers of per-example gradients that the protected sum holds at once
WAY_OUT = "use GroupNorm or LayerNorm, which look at one example at a time"


@dataclass(frozen=True, slots=True)
class Exposure:
    """What happens to an example of a client: so many noisy sums, in each with probability `rate`.

    The fields are those of `accounting.Release`. sampling: "poisson", or "none" where each of its `steps`
    sums surely holds the example.
    """

    mechanism: Literal["gaussian", "discrete_gaussian"]
    noise: float
    steps: int
    sampling: Literal["poisson", "none"]
    rate: float


def dp_sgd(
    algorithm: Algorithm,
    *,
    norm: float,
    multiplier: float,
    sampling: Literal["poisson", "shuffled"] = "poisson",
    protected: bool = True,
) -> Algorithm:
    """The algorithm with private steps: per-example gradients of L2 norm <= `norm`, and noise on their sum.

    multiplier: standard deviation of the noise / norm; 0 only clips. sampling: "poisson", each example is in
    each batch with probability batch_size / n; or "shuffled" passes, for which no amplification may be
    credited. protected: integer noise on a grid, and the coins of batches, from the operating system; False:
    both from the run's seed. Whatever the algorithm adds to gradients (a proximal term, control variates) it
    adds to the private one. Raises ConfigError; for a model that mixes examples, when a client starts (see
    also `check_model`).
    """
    where = f"dp_sgd(norm={norm}, multiplier={multiplier})"
    if not 0 < norm < math.inf:
        raise ConfigError(f"{where}: norm must be a finite number > 0", "0.1 to 10 is usual")
    if not 0 <= multiplier < math.inf:
        raise ConfigError(f"{where}: multiplier must be a finite number >= 0", "about 1 is usual")
    if sampling not in ("poisson", "shuffled"):
        raise ConfigError(f"dp_sgd(sampling={sampling!r}): must be poisson or shuffled", "")
    if algorithm.local(0)["batch_size"] is None:
        raise ConfigError(
            "dp_sgd: batch_size is all of a client's examples, and their number would be the denominator",
            "set client.batch_size: the expected number of examples in a step",
        )

    def local(version: int) -> Mapping[str, Any]:
        return {**algorithm.local(version), "sampling": sampling, "secret": protected}

    work = private_work(algorithm.client_work, norm=norm, multiplier=multiplier, protected=protected)
    return replace(algorithm, client_work=work, local=local)


def private_work(work: ClientWork, *, norm: float, multiplier: float, protected: bool) -> ClientWork:
    """Let `work.gradient` see an objective whose gradient is the private one, whatever it makes of it."""
    make = _protected if protected else _simulated

    def start(down: Tree, memory: Tree, config: Mapping[str, Any]) -> tuple[Params, Tree]:
        for name, buffer in down["model"]["buffers"].items():
            if buffer.is_floating_point():
                raise ConfigError(f"dp_sgd: the buffer {name} is statistics over examples", WAY_OUT)
        params, carry = work.start(down, memory, config)
        return params, {**carry, "expected": torch.tensor(float(config["batch_size"]))}

    def gradient(
        objective: Callable[..., Any], params: Params, batch: Batch, mask: Any, carry: Tree, key: Any
    ) -> tuple[Params, Tree]:
        if key is None:
            raise RunError(
                "dp_sgd: this trainer gives no key to a step", "use the loop or vectorised trainer"
            )
        kept = torch.ones(len(batch[1])) if mask is None else mask
        grads, losses = make(objective, params, batch, kept, carry, key, norm, multiplier)
        loss = torch.where(kept > 0, losses, 0).sum() / kept.sum().clamp(min=1)

        def linear(params: Params, batch: Batch, carry: Tree) -> tuple[Tensor, Tree]:
            del batch
            found: Tensor = _Given.apply(  # type: ignore[no-untyped-call]
                *(grads[name] for name in params), *params.values()
            )
            return found / carry["expected"].to(found.dtype), carry

        slope, carry = work.gradient(linear, params, batch, None, carry, key)
        return slope, {**carry, "loss": loss}

    return work._replace(start=start, gradient=gradient)


class _Given(torch.autograd.Function):
    """gradients, params -> [0], whose gradients with respect to params are those given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*leaves: Tensor) -> Tensor:
        return leaves[0].new_zeros(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs[: len(inputs) // 2])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        grads = ctx.saved_tensors
        return (*[None] * len(grads), *(g * slope.reshape([1] * g.dim()) for g in grads))


def check_model(module: nn.Module) -> None:
    """Raise ConfigError for layers whose output for one example depends on the others of its batch."""
    for name, layer in module.named_modules():
        tracks = isinstance(layer, _InstanceNorm) and layer.track_running_stats
        if isinstance(layer, _BatchNorm) or tracks:
            raise ConfigError(f"dp_sgd: {name or 'model'} ({type(layer).__name__}) mixes examples", WAY_OUT)


def exposures(
    counts: Iterable[int],
    *,
    batch_size: int,
    epochs: int,
    steps: int | None,
    rounds: int,
    multiplier: float,
    sampling: Literal["poisson", "shuffled"] = "poisson",
    protected: bool = True,
) -> list[Exposure]:
    """What clients with so many examples expose one of them to, in `rounds` tasks each; none below another.

    The guarantee is the worst of these. counts, and so the rates, are taken as known to the adversary.
    Shuffled: an example is in one batch of each pass, and nothing is credited but that.
    """
    rates: dict[float, int] = {}
    for n in set(counts):
        if n < 1:
            continue
        a_pass = -(-n // batch_size)
        if sampling == "poisson":
            rate, taken = min(batch_size / n, 1.0), steps or epochs * a_pass
        else:
            rate, taken = 1.0, -(-steps // a_pass) if steps else epochs
        rates[rate] = max(rates.get(rate, 0), taken * rounds)
    worst: list[Exposure] = []
    for rate in sorted(rates, reverse=True):
        if not worst or rates[rate] > worst[-1].steps:
            kind = "poisson" if sampling == "poisson" and rate < 1 else "none"
            law = "discrete_gaussian" if protected else "gaussian"
            worst.append(Exposure(law, multiplier, rates[rate], kind, rate))  # type: ignore[arg-type]
    return worst


def sensitivity_on_grid(norm: float, size: int) -> int:
    """The clipping norm in steps of the protected grid, for a model of `size` parameters: at least FINE."""
    return math.floor(norm / grid(norm, size))


def grid(norm: float, size: int) -> float:
    """The step of the grid: a power of two, so that scaling by it is exact."""
    return 2.0 ** math.floor(math.log2(norm / (FINE * math.sqrt(size))))


def example_gradients(
    objective: Callable[..., Any], params: Params, batch: Batch, carry: Tree
) -> tuple[Params, Tensor]:
    """Gradients [B, ...] and losses [B] of the examples, each in a batch of its own."""

    def loss(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses, _ = objective(params, (x.unsqueeze(0), y.unsqueeze(0)), carry)
        return losses[0], losses[0].detach()

    each = torch.func.grad(loss, has_aux=True)
    many = torch.func.vmap(each, in_dims=(None, 0, 0), randomness="different")
    # Layers that a trainer has batched over clients know no second vmap, nor do torch's kernels of attention.
    with torch._C.DisableTorchFunction(), sdpa_kernel(SDPBackend.MATH):
        try:
            made: tuple[Params, Tensor] = many(dict(params), *batch)
        except RuntimeError:  # torch's own GRU, for one
            if current_level() is not None:
                raise
            made = trees.map_tree(
                lambda *rows: torch.stack(rows),
                *(each(dict(params), *row) for row in zip(*batch, strict=True)),
            )
    return made


def clipped_sum(
    objective: Callable[..., Any], params: Params, batch: Batch, mask: Tensor, carry: Tree, norm: float
) -> tuple[Params, Tensor]:
    """The sum of the clipped gradients of the examples that the mask keeps; and all losses [B]."""
    grads, losses = example_gradients(objective, params, batch, carry)
    squares = torch.stack([g.flatten(1).square().sum(1) for g in trees.leaves(grads)]).sum(0)
    factors = clip_factors(squares, mask, norm)

    def total(g: Tensor) -> Tensor:
        flat = torch.where((factors > 0).unsqueeze(1), g.flatten(1), 0)  # 0 * NaN would be NaN
        return (factors.to(g.dtype) @ flat).reshape(g.shape[1:])

    return trees.map_tree(total, grads), losses


def _simulated(
    objective: Any,
    params: Params,
    batch: Batch,
    mask: Tensor,
    carry: Tree,
    key: Any,
    norm: float,
    sigma: float,
) -> tuple[Params, Tensor]:
    batched = current_level() is not None  # by the vectorised trainer, which compares with what stands alone
    made = ghost_sum(objective, params, batch, mask, carry, norm) if batched else None
    grads, losses = made or clipped_sum(objective, params, batch, mask, carry, norm)
    if key is STILL or sigma == 0:
        return grads, losses
    noise = float_noise(key, _size(params), sigma * norm)
    return trees.map_tree(lambda g, z: g + z.to(g.dtype), grads, _split(noise, params)), losses


def _protected(
    objective: Any,
    params: Params,
    batch: Batch,
    mask: Tensor,
    carry: Tree,
    key: Any,
    norm: float,
    sigma: float,
) -> tuple[Params, Tensor]:
    size, pieces, sums = _size(params), list[Tensor](), torch.zeros((), dtype=torch.int64)
    step, most = grid(norm, size), sensitivity_on_grid(norm, size)
    for part in torch.split(torch.arange(len(mask)), max(AT_ONCE // size, 1)):
        rows = batch[0][part], batch[1][part]
        grads, losses = example_gradients(objective, params, rows, carry)
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in trees.leaves(grads)]).sum(0)
        factors = clip_factors(squares, mask[part], norm)
        flat = torch.cat([g.flatten(1) for g in trees.leaves(grads)], 1).double()
        flat = torch.where((factors > 0).unsqueeze(1), flat * (factors / step).unsqueeze(1), 0)
        sums = sums + within(flat.to(torch.int64), most).sum(0)  # the conversion truncates towards zero
        pieces.append(losses)
    if key is not STILL and sigma > 0:
        sums = sums + integer_noise(sums, sigma * most)
    return trees.map_tree(lambda z, p: (z * step).to(p.dtype), _split(sums, params), dict(params)), torch.cat(
        pieces
    )


def within(examples: Tensor, most: int) -> Tensor:
    """Integer gradients [B, d]; zero for an example whose norm is above `most` after all. In exact integers.

    Rounding of the float norm may let it pass by a few units in the last place; then scale it once more.
    """
    over = examples.square().sum(1, keepdim=True) > most * most
    shrunk = torch.where(over, (examples.double() * (1 - 2.0**-20)).to(torch.int64), examples)
    return torch.where(shrunk.square().sum(1, keepdim=True) > most * most, 0, shrunk)


@custom_op("coterie::float_noise", mutates_args=())
def float_noise(seed: Tensor, size: int, scale: float) -> Tensor:
    """N(0, scale^2) in float32, [*seed.shape, size]: a function of each int64 seed. For simulation alone."""
    made = np.empty((seed.numel(), size), dtype=np.float32)
    for row, each in zip(made, seed.reshape(-1).tolist(), strict=True):
        np.random.Generator(np.random.SFC64(each % 2**64)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(made).mul_(scale).reshape(*seed.shape, size)


@float_noise.register_fake
def _(seed: Tensor, size: int, scale: float) -> Tensor:
    del scale
    return seed.new_empty((*seed.shape, size), dtype=torch.float32)


@float_noise.register_vmap
def _(info: Any, in_dims: Any, seed: Tensor, size: int, scale: float) -> tuple[Tensor, int]:
    del info
    return float_noise(seed.movedim(in_dims[0], 0), size, scale), 0


@custom_op("coterie::integer_noise", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def integer_noise(like: Tensor, sigma: float) -> Tensor:
    """Discrete Gaussian noise (int64) of this shape, from the operating system's randomness."""
    return discrete_gaussian(like.shape, sigma)


@integer_noise.register_fake
def _(like: Tensor, sigma: float) -> Tensor:
    del sigma
    return torch.empty_like(like)


@integer_noise.register_vmap
def _(info: Any, in_dims: Any, like: Tensor, sigma: float) -> tuple[Tensor, int]:
    del info
    return integer_noise(like.movedim(in_dims[0], 0), sigma), 0


def _size(params: Params) -> int:
    return sum(leaf.numel() for leaf in params.values())


def _split(flat: Tensor, params: Params) -> Params:
    """A vector as the tree of params."""
    parts = torch.split(flat, [leaf.numel() for leaf in params.values()])
    return {name: part.reshape(leaf.shape) for part, (name, leaf) in zip(parts, params.items(), strict=True)}
