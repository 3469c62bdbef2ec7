"""What a config promises of privacy: its chain of transforms, checked, calibrated, and put in words.

Only what is listed in `Promise.claims` is claimed. How the chain works is in `core.transforms`, `transforms`
and `privacy`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from coterie.core import Algorithm, ConfigError, Transform, derive
from coterie.experiment import parts
from coterie.experiment.config import Config, Section
from coterie.privacy.accounting import Release, bound
from coterie.privacy.added import FEW_BITS, At, Mechanism, noise
from coterie.storage import write_atomic
from coterie.transforms import adaptive_clip, clip

Accountant = Literal["pld", "rdp"]
LEDGER = "privacy.json"  # of a run folder
SIMULATED = "simulated noise: not private"
SERVERS = ("synchronous", "hierarchical")  # schedules whose rounds are sums over one cohort
LIMITS = (
    "side channels (time, memory, which clients were asked and how many answered) are not covered",
    "the run's seed reveals the cohorts: keep it secret where amplification by sampling is credited",
)


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
    accountant: Accountant = "pld",
) -> Section:
    """Noise on the sum (at the "server"), on each update (at the "client"), or in "shares" of the sum's.

    multiplier: noise over the clipping norm; budget: { epsilon, delta }, from which it is calibrated. With
    both, the run stops before the budget is passed. delta: of the claim, where there is no budget.
    protected: integer noise from the operating system; false: float noise from the seed, for research.
    least: honest clients whose shares make up the noise.
    """
    if multiplier is None and budget is None:
        raise ConfigError("noise needs a multiplier or a budget", "budget = { epsilon = 8, delta = 1e-5 }")
    if multiplier is not None and not (math.isfinite(multiplier) and multiplier > 0):
        raise ConfigError(f"multiplier = {multiplier}: must be > 0", "1.1 is a usual noise multiplier")
    if mechanism == "skellam" and accountant == "pld":
        raise ConfigError("accountant = 'pld': none is known for skellam noise", 'accountant = "rdp"')
    epsilon = None
    if budget is not None:
        budget = parts.call(_budget, budget, "budget", label="a budget")
        if delta not in (None, budget["delta"]):
            raise ConfigError(f"delta = {delta}, and in the budget {budget['delta']}", "leave delta out")
        epsilon, delta = budget["epsilon"], budget["delta"]
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ConfigError(f"budget.epsilon = {epsilon}: must be > 0", "1 is strong, 8 is usual")
    if delta is None:
        if mechanism != "laplace":
            raise ConfigError("delta: missing", "a delta well below 1 / clients, for example 1e-5")
        delta = 0.0
    if not 0 <= delta < 1 or (delta == 0 and mechanism != "laplace"):
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


@dataclass(frozen=True)
class Promise:
    """The noise of a run: what it is, what a round of it spends, and how many rounds the budget allows.

    rounds: as many as the run may have; wanted: as many as the config asks for.
    """

    clip: Section
    noise: Section
    multiplier: float
    sampling: str  # what the schedule really does: "poisson", or "none" where nothing is credited
    rate: float
    cohort: int
    wanted: int
    rounds: int
    lost: int = 0  # rounds that may have been released before a crash, and that no checkpoint holds

    def epsilon(self, rounds: int) -> float:
        """What so many rounds spend."""
        return epsilon(self, self.multiplier, rounds)

    def ledger(self) -> Section:
        """What a resumed run must have in common with its beginning."""
        return {
            "mechanism": self.noise["mechanism"],
            "at": self.noise["at"],
            "multiplier": self.multiplier,
            "sampling": self.sampling,
            "rate": self.rate,
            "protected": self.noise["protected"],
        }

    def claims(self, rounds: int) -> list[Section]:
        """result.json["privacy"], after so many rounds that may have been released."""
        at, protected = self.noise["at"], self.noise["protected"]
        trust = {
            "server": "whoever sees the models the server releases; the server itself is trusted, and sees "
            "every clipped update",
            "client": "the server, and whoever sees what it sees",
            "shares": "whoever sees only the sums; without secure aggregation the SERVER SEES EACH SHARE, "
            "against which this protects nothing",
        }
        notes = list(LIMITS)
        if at == "shares":
            notes.insert(0, f"secure aggregation, and at least {self.noise['least']} honest repliers a round")
        if self.sampling == "poisson":
            notes.insert(
                0, "each client is in a round independently with the sampling rate, unseen by others"
            )
        else:
            notes.insert(0, "no amplification by sampling is credited: a client may be in every round")
        if not protected:
            notes.insert(0, SIMULATED)
        return [
            {
                "unit": "client",
                "adversary": trust[at],
                "epsilon": self.epsilon(rounds),
                "delta": self.noise["delta"],
                "mechanism": ("discrete " if protected and self.noise["mechanism"] != "skellam" else "")
                + self.noise["mechanism"],
                "at": at,
                "noise_multiplier": self.multiplier,
                "clipping_norm": "adaptive" if self.clip["adaptive"] else self.clip["norm"],
                "sampling": {"kind": self.sampling, "rate": self.rate},
                "rounds": rounds,
                "accountant": self.noise["accountant"],
                "neighbours": "any two updates of a client" if at == "client" else "add or remove one client",
                "assumptions": notes,
                "protected": protected,
            }
        ]


def promise(config: Config, schedule: Any, clients: int) -> Promise | None:
    """The promise of a config with noise; None without. Raises ConfigError for a chain that keeps none."""
    chain = settings(config)
    place = next((i for i, (kind, _) in enumerate(chain) if kind == "noise"), None)
    if place is None:
        if any(told.get("adaptive") for _, told in chain):
            raise ConfigError(
                "transforms: an adaptive norm reads a bit of each client, which only noise protects",
                "add a noise transform after it, or give the clip a norm",
            )
        return None
    _refuse_chain(chain, place)
    told, before = chain[place][1], chain[place - 1][1]
    _refuse_schedule(config, told, schedule, clients)
    cohort = _cohort(config, clients)
    credited = told["at"] != "client" and told["mechanism"] != "skellam"
    poisson = getattr(schedule, "sampling", "") == "poisson" and credited
    made = Promise(
        before, told, told["multiplier"] or 0.0, "poisson" if poisson else "none",
        cohort / clients if poisson else 1.0, cohort, int(schedule.rounds), int(schedule.rounds),
    )  # fmt: skip
    if told["multiplier"] is None:
        return replace(made, multiplier=calibrated(made))
    return made if told["epsilon"] is None else replace(made, rounds=affordable(made))


def settings(config: Config) -> list[tuple[str, Section]]:
    """Each transform's kind and full settings."""
    return [
        (section["kind"], parts.build(TRANSFORMS, section, f"transforms[{place}]"))
        for place, section in enumerate(config.transforms)
    ]


def with_multiplier(config: Config, promise: Promise | None) -> Config:
    """The config with the calibrated multiplier in it, for those who train for it."""
    if promise is None:
        return config
    return replace(
        config,
        transforms=[
            {**each, "multiplier": promise.multiplier} if each["kind"] == "noise" else each
            for each in config.transforms
        ],
    )


def chain_of(config: Config, clients: int) -> tuple[Transform, ...]:
    """The transforms of a config whose noise has its multiplier. clients: of the whole population."""
    made: list[Transform] = []
    chain, cohort = settings(config), _cohort(config, clients)
    multiplier = next((told["multiplier"] for kind, told in chain if kind == "noise"), 0.0)
    for place, (kind, told) in enumerate(chain):
        where = f"transforms[{place}]"
        if kind == "noise":
            before = chain[place - 1][1]
            names = ("at", "mechanism", "protected", "least")
            given = {name: told[name] for name in names}
            given |= {"multiplier": multiplier or 0.0, "norm": before["norm"], "order": before["order"]}
            given |= {"cohort": cohort, "key": derive(config.seed, "noise", place)}
            made.append(parts.call(noise, {}, where, given))
        elif told["adaptive"]:
            given = {**told["adaptive"], "multiplier": multiplier or 0.0, "cohort": cohort}
            made.append(parts.call(adaptive_clip, {}, where, given))
        else:
            given = {name: told[name] for name in ("norm", "order", "per")}
            made.append(parts.call(clip, {}, where, given))
    return tuple(made)


def refuse_parts(config: Config, promise: Promise | None, algorithm: Algorithm, initial: Any) -> None:
    """Refuse what client-level privacy cannot hold together with."""
    if promise is None:
        return
    weighting = algorithm.local(0).get("weighting")
    if weighting != "uniform":
        raise ConfigError(
            f"algorithm.weighting = {weighting!r}: under client-level privacy no client may count for more",
            'set algorithm.weighting = "uniform"',
        )
    if initial["buffers"]:
        raise ConfigError(
            f"the model has buffers ({', '.join(sorted(initial['buffers'])[:3])}): averages over clients' "
            "data that clipping would tear apart",
            "use a model without: GroupNorm instead of BatchNorm",
        )
    if promise.noise["protected"] and config.compare:
        raise ConfigError(
            f"compare = {config.compare}: baselines train on the clients' data without any noise, and the "
            "run's folder would publish what they reach",
            "leave compare out; or protected = false, for research on data that may be seen",
        )
    if promise.noise["protected"] and config.run["checkpoint_every"] != 1:
        raise ConfigError(
            f"run.checkpoint_every = {config.run['checkpoint_every']}: after a crash, rounds that were "
            "released would be noised and released a second time",
            "leave run.checkpoint_every at 1",
        )


def _refuse_chain(chain: list[tuple[str, Section]], place: int) -> None:
    kinds = [kind for kind, _ in chain]
    if "clip" not in kinds[:place]:
        late = "clip" in kinds
        raise ConfigError(
            f"transforms[{place}]: noise {'before the clip' if late else 'without a clip'} protects nobody: "
            "one client's update may be as large as it likes",
            "put the clip first" if late else 'add { kind = "clip", norm = 1.0 } before it',
        )
    if place + 1 < len(chain):
        raise ConfigError(
            f"transforms[{place + 1}]: {kinds[place + 1]} after the noise voids what is accounted for",
            "make the noise the last transform, and the only noise",
        )
    told, before = chain[place][1], chain[place - 1][1]
    if told["mechanism"] == "laplace" and before["order"] != 1:
        raise ConfigError(
            f"transforms[{place}]: laplace noise is accounted for in L1, the clip is in L{before['order']}",
            "set order = 1 in the clip, or use gaussian noise",
        )
    if before["adaptive"] and told["at"] == "client":
        raise ConfigError(
            f"transforms[{place}]: a norm that adapts to all clients cannot be had from each one's noise",
            'use a clip with a norm, or at = "server"',
        )


def _refuse_schedule(config: Config, told: Section, schedule: Any, clients: int) -> None:
    kind = config.schedule["kind"]
    if kind not in SERVERS:
        raise ConfigError(
            f"schedule.kind = {kind!r}: its updates do not meet in one sum a round, which the noise is for",
            f"use {' or '.join(map(repr, SERVERS))}",
        )
    if getattr(schedule, "sampling", "") == "weighted":
        raise ConfigError(
            "schedule.sampling = 'weighted': how often a client takes part would tell how much data it has",
            'use "uniform" or "poisson"',
        )
    if told["delta"] >= 1 / clients:
        raise ConfigError(
            f"delta = {told['delta']}: with {clients} clients it must be below {1 / clients:.3g}, else "
            "giving one client's data away would be allowed",
            f"{0.1 / clients:.0e} is a tenth of that",
        )
    if told["least"] is not None:
        quorum = config.schedule.get("quorum", 1)
        cohort = _cohort(config, clients)
        needed = math.ceil(quorum * cohort) if isinstance(quorum, float) else quorum
        if needed < told["least"]:
            raise ConfigError(
                f"schedule.quorum = {quorum}: below least = {told['least']} replies is too little noise",
                f"set schedule.quorum = {told['least']} or more",
            )


def _cohort(config: Config, clients: int) -> int:
    wanted = config.schedule.get("cohort", 1)
    return max(1, math.ceil(wanted * clients - 1e-9) if isinstance(wanted, float) else int(wanted))


def epsilon(promise: Promise, multiplier: float, rounds: int) -> float:
    """What so many rounds with this noise multiplier spend at the promise's delta."""
    told, z = promise.noise, multiplier
    if told["at"] == "client":
        z /= 2  # two updates within the norm differ by up to twice the norm
    if told["mechanism"] == "skellam":
        # Agarwal, Kairouz, Liu 2021, theorem 3.5, over integers of norm D >= 2^bits, where |x|_1 <= D^2: its
        # RDP is at most alpha / 2 (1 / z^2 + 3.5 / (z^4 D^2)), as that of a Gaussian with less noise
        z = (z**-2 + 3.5 * z**-4 * 4.0**-FEW_BITS) ** -0.5
    return _spent(told, z, promise.rate, rounds)


def calibrated(promise: Promise) -> float:
    """The least multiplier, within a thousandth, with which all wanted rounds keep to the budget."""
    low, high = 0.0, 1.0
    while epsilon(promise, high, promise.wanted) > promise.noise["epsilon"]:
        low, high = high, high * 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if middle > 0.05 and epsilon(promise, middle, promise.wanted) <= promise.noise["epsilon"]:
            high = middle
        else:
            low = middle
    return high


def affordable(promise: Promise, spent: int = 0) -> int:
    """How many rounds the run may have, when so many more than it has kept may have been released."""
    budget = promise.noise["epsilon"]
    low, high = 0, promise.wanted + spent
    if budget is not None and epsilon(promise, promise.multiplier, high) > budget:
        while high - low > 1:
            middle = (low + high) // 2
            within = epsilon(promise, promise.multiplier, middle) <= budget
            low, high = (middle, high) if within else (low, middle)
        high = low
    if high <= spent:
        raise ConfigError(
            f"budget.epsilon = {budget}: with noise multiplier {promise.multiplier:.4g} it allows "
            f"{high} rounds, and {spent} may have been released that no checkpoint holds",
            "raise the multiplier or the budget",
        )
    return high - spent


def _spent(told: Section, multiplier: float, rate: float, rounds: int) -> float:
    if not rounds:
        return 0.0
    kind: Literal["laplace", "gaussian"] = "laplace" if told["mechanism"] == "laplace" else "gaussian"
    sampling: Literal["poisson", "none"] = "poisson" if rate < 1 else "none"
    release = Release(mechanism=kind, noise=multiplier, steps=rounds, sampling=sampling, rate=rate)
    spent = bound([release], delta=told["delta"], accountant=told["accountant"], neighbours="add/remove")
    return spent.epsilon


def reopened(made: Any, folder: Path) -> Any:
    """The parts of a run that goes on, with what was spent before, and its ledger marked as open.

    A run that ended without closing its ledger may have released one round more than it kept. Raises
    ConfigError when the ledger in the folder is not that of the config.
    """
    promised: Promise | None = made.promise
    if promised is None:
        return made
    path, mine = folder / LEDGER, promised.ledger()
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {**mine, "open": False, "lost": 0}
    wrong = next((name for name in mine if kept.get(name) != mine[name]), None)
    if wrong is not None:
        raise ConfigError(
            f"--resume {folder}: its privacy ledger says {wrong} = {kept.get(wrong)!r}, the config gives "
            f"{mine[wrong]!r}: what was spent and what would be spent do not belong together",
            "resume with the config and the rounds it was started with, or start a new run",
        )
    # simulated noise is the same again when a round is repeated
    lost = kept["lost"] + (1 if kept["open"] and promised.noise["protected"] else 0)
    write_atomic(path, json.dumps({**mine, "open": True, "lost": lost}).encode())
    promised = replace(promised, lost=lost, rounds=affordable(promised, lost))
    return replace(made, promise=promised, schedule=replace(made.schedule, rounds=promised.rounds))


def closed(promise: Promise | None, folder: Path) -> None:
    """Write down that the run ended in order: no round is in flight."""
    if promise is not None:
        ended = {**promise.ledger(), "open": False, "lost": promise.lost}
        write_atomic(folder / LEDGER, json.dumps(ended).encode())


def told(promise: Promise | None, rounds: int) -> Section | None:
    """result.json["privacy"] after so many committed rounds; None without noise."""
    if promise is None:
        return None
    withheld = ["train metrics", "evaluation of clients", *["clients' data"] * promise.noise["protected"]]
    return {
        "claims": promise.claims(rounds + promise.lost),
        "ledger": {**promise.ledger(), "rounds": rounds, "lost": promise.lost},
        "withheld": withheld,
    }
