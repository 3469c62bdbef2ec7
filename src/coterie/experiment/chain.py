"""The chain of transforms that a config names: its settings, and what is built of them.

How a chain works is in `core.transforms`, `transforms` and `privacy`; what it promises is in `promise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from coterie.core import ConfigError, Transform, derive
from coterie.experiment import parts
from coterie.experiment.config import Config, Section
from coterie.privacy.accounting import Accountant
from coterie.privacy.added import At, Mechanism, noise
from coterie.transforms import adaptive_clip, clip


def clip_settings(
    *,
    norm: float | None = None,
    order: Literal[1, 2] = 2,
    per: Literal["update", "layer"] = "update",
    adaptive: Section | None = None,
) -> Section:
    """Bound what one client can change, by the norm of its update, in L2 or L1.

    per: the whole update, or every layer its part of the norm. adaptive: { quantile, lr, initial, noise }.
    """
    if (norm is None) == (adaptive is None):
        raise ConfigError("a clip needs a norm, or adaptive, not both", "norm = 1.0")
    if adaptive is None:
        return {"norm": norm, "order": order, "per": per, "adaptive": None}
    if order != 2 or per != "update":
        raise ConfigError("an adaptive norm is of the whole update, in L2", "leave order and per out")
    full = parts.call(_adaptive, adaptive, "adaptive", label="adaptive")
    return {"norm": 1.0, "order": 2, "per": "update", "adaptive": full}


def _adaptive(
    *, quantile: float = 0.5, lr: float = 0.2, initial: float = 0.1, noise: float | None = None
) -> Section:
    return dict(locals())


def noise_settings(
    *,
    at: At,
    mechanism: Mechanism = "gaussian",
    multiplier: float | None = None,
    delta: float | None = None,
    budget: Section | None = None,
    protected: bool = True,
    least: int | None = None,
    accountant: Accountant | None = None,
) -> Section:
    """Noise on the sum (at the "server"), on each update (at the "client"), or in "shares" of the sum's.

    multiplier: noise over the clipping norm; budget: { epsilon, delta }, from which it is calibrated. With
    both, the run stops before the budget is passed. delta: of the claim, where there is no budget.
    protected: integer noise from the operating system; false: float noise from the seed, for research.
    least: honest clients whose shares make up the noise. accountant: None takes the one that fits.
    """
    if multiplier is None and budget is None:
        raise ConfigError("noise needs a multiplier or a budget", "budget = { epsilon = 8, delta = 1e-5 }")
    if multiplier is not None and not (math.isfinite(multiplier) and multiplier > 0):
        raise ConfigError(f"multiplier = {multiplier}: must be > 0", "1.1 is a usual noise multiplier")
    epsilon = None
    if budget is not None:
        budget = parts.call(_budget, budget, "budget", label="a budget")
        if delta not in (None, budget["delta"]):
            raise ConfigError(f"delta = {delta}, and in the budget {budget['delta']}", "leave delta out")
        epsilon, delta = budget["epsilon"], budget["delta"]
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ConfigError(f"budget.epsilon = {epsilon}: must be > 0", "1 is strong, 8 is usual")
    if delta is None:
        raise ConfigError("delta: missing", "a delta well below 1 / clients, for example 1e-5")
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta}: must be in (0, 1)", "well below 1 / clients, for example 1e-5")
    if (at == "shares") != (least is not None):
        raise ConfigError(
            "least: how many honest clients' shares make up the noise; only shares have it",
            'at = "shares" with least = 10, for example',
        )
    if least is not None and least < 1:
        raise ConfigError(f"least = {least}: must be >= 1")
    return {
        "at": at, "mechanism": mechanism, "multiplier": multiplier, "delta": delta, "epsilon": epsilon,
        "protected": protected, "least": least, "accountant": accountant,
    }  # fmt: skip


def _budget(*, epsilon: float, delta: float) -> Section:
    return dict(locals())


TRANSFORMS: Mapping[str, Callable[..., Section]] = {"clip": clip_settings, "noise": noise_settings}


def settings(config: Config) -> list[tuple[str, Section]]:
    """Each transform's kind and full settings."""
    return [
        (section["kind"], parts.build(TRANSFORMS, section, f"transforms[{place}]"))
        for place, section in enumerate(config.transforms)
    ]


def chain_of(config: Config, clients: int) -> tuple[Transform, ...]:
    """The transforms of a config. clients: of the whole population.

    Without the multiplier, which a site does not know, noise that only the server adds is the server's
    matter. Raises ConfigError where a client would have to add it.
    """
    made: list[Transform] = []
    chain, cohort = settings(config), cohort_of(config, clients)
    multiplier = next((told["multiplier"] for kind, told in chain if kind == "noise"), None)
    for place, (kind, told) in enumerate(chain):
        where = f"transforms[{place}]"
        if kind == "noise":
            before = chain[place - 1][1]
            names = ("at", "mechanism", "protected", "least")
            given = {name: told[name] for name in names}
            given |= {"multiplier": multiplier, "norm": before["norm"], "order": before["order"]}
            given |= {"cohort": cohort, "key": derive(config.seed, "noise", place)}
            made.append(parts.call(noise, {}, where, given))
        elif told["adaptive"]:
            given = {**told["adaptive"], "multiplier": multiplier, "cohort": cohort}
            made.append(parts.call(adaptive_clip, {}, where, given))
        else:
            given = {name: told[name] for name in ("norm", "order", "per")}
            made.append(parts.call(clip, {}, where, given))
    return tuple(made)


def cohort_of(config: Config, clients: int) -> int:
    """The expected clients of a round."""
    wanted = config.schedule.get("cohort", 1)
    return max(1, math.ceil(wanted * clients - 1e-9) if isinstance(wanted, float) else int(wanted))
